"""From settings to a running service: model, plan, variants, engine, application.

The only place that knows every part; each part knows only its neighbours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fastapi import FastAPI

from pruning.calibration import Progress
from pruning.loading import BaseModel, cache_folder, load_base_model
from pruning.plan import DEFAULT_DROP, Plan, PlanCache, PlanRequest, parse_layers, read_plan
from pruning.quantised import is_on_grid, quantise, runs_here
from pruning.variants import FULL, Variant, Variants
from server import __version__
from server.api import chat, completions, models, operations, tokenizer
from server.api.service import Service
from server.app import create_app
from server.config import PRUNED, Settings
from server.engine.assembly import build_engine
from server.engine.detokenize import Vocabulary
from server.engine.engine import Engine
from server.metrics import Metrics

logger = logging.getLogger(__name__)


class SettingsError(ValueError):
    """Settings that are each fine but do not fit together."""


@dataclass(frozen=True, slots=True)
class Started:
    """A service that only lacks a socket. The engine's thread is not running yet."""

    app: FastAPI
    service: Service
    engine: Engine
    plan: Plan
    plan_origin: str


def start(
    settings: Settings, progress: Progress, on_death: Callable[[], None] = lambda: None
) -> Started:
    """Load the model, find its plan and build what serves it.

    Raises:
        ModelError, PlanError, CalibrationError, VariantError, QuantisationError,
            EngineConfigError, SettingsError: with one sentence for the user.
    """
    base = load_base_model(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
    )
    if settings.served_model_name:
        base = replace(base, name=settings.served_model_name)
    plan, origin = find_plan(settings, base, progress)
    variants = make_variants(settings, plan)
    _quantise(settings, base)
    engine = build_engine(base, variants, settings.engine(base.device), on_death)
    service = make_service(settings, base, plan, engine)
    app = create_app(
        service,
        [part.router for part in (completions, chat, models, tokenizer, operations)],
        api_keys=settings.api_key,
        cors_origins=settings.cors_origin,
        max_body_size=settings.max_body_size,
    )
    return Started(app, service, engine, plan, origin)


def _quantise(settings: Settings, base: BaseModel) -> None:
    """Put the weights into four bits if that was asked for, or is free of loss and faster."""
    automatic = settings.quantization == "auto" and settings.dtype == "auto"
    if settings.quantization == "int4" or (
        automatic and runs_here(base.device) and is_on_grid(base.model)
    ):
        quantise(base.model)
        logger.info("weights: int4 in groups of 32; activations and KV cache: bfloat16")


def find_plan(settings: Settings, base: BaseModel, progress: Progress) -> tuple[Plan, str]:
    """Return the plan and where it came from: the file, the cache, or computed now."""
    if settings.plan is not None:
        plan = read_plan(Path(settings.plan))
        plan.check_fits(base)
        return plan.dropping(settings.drop or str(plan.drop)), settings.plan
    request = PlanRequest(
        calibration=settings.calibration, protected=parse_layers(settings.protect)
    )
    cache = PlanCache(cache_folder() / "plans")
    plan, origin = cache.load_or_compute(base, request, progress)
    return plan.dropping(settings.drop or DEFAULT_DROP), origin


def make_variants(settings: Settings, plan: Plan) -> Variants:
    """Return `full`, `pruned` and whatever --variant adds, all from one plan."""
    layers = plan.model.layers
    found = [
        Variant(FULL, frozenset(range(layers))),
        Variant(PRUNED, plan.kept_layers()),
    ]
    for definition in settings.variant:
        name, _, drop = definition.partition("=")
        found.append(Variant(name.lower(), plan.dropping(drop).kept_layers()))
    variants = Variants(layers, found)
    if settings.default_variant.lower() not in variants:
        names = ", ".join(variant.name for variant in variants)
        raise SettingsError(
            f"--default-variant {settings.default_variant!r} is not one of: {names}"
        )
    return variants


def make_service(settings: Settings, base: BaseModel, plan: Plan, engine: Engine) -> Service:
    """Return what the endpoints share."""
    return Service(
        engine=engine,
        metrics=Metrics(base.name, engine.describe(), plan.id, __version__, engine.stats),
        tokenizer=base.tokenizer,
        vocabulary=Vocabulary(base.tokenizer),
        vocabulary_size=int(base.model.config.get_text_config().vocab_size),
        end_tokens=end_tokens(base),
        model_name=base.name,
        model_fingerprint=base.fingerprint,
        plan_id=plan.id,
        version=__version__,
        default_variant=settings.default_variant.lower(),
        created=int(time.time()),
    )


def end_tokens(base: BaseModel) -> frozenset[int]:
    """Return the tokens with which the model ends its text, by its generation config and
    tokenizer."""
    configured = base.model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*ends, base.tokenizer.eos_token_id] if token is not None)
