"""From settings to a running service: model, plan, variants, engine, application.

The only place that knows every part; each part knows only its neighbours.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from fastapi import FastAPI

from pruning.budget import DEFAULT_BUDGET, Budget, chosen
from pruning.calibration import SELF, Progress
from pruning.loading import BaseModel, cache_folder, load_base_model
from pruning.plan import Plan, parse_layers, read_with_substitutes
from pruning.plan_cache import PlanCache, PlanRequest, Wanted
from pruning.quantised import four_bit_layers, is_on_grid, quantise, quantise_substitutes, runs_here
from pruning.substitutes import Substitutes
from pruning.variants import FULL, Variant, Variants
from server import __version__
from server.api import chat, completions, models, operations, tokenizer
from server.api.service import Service
from server.app import create_app
from server.config import PRUNED, Settings, VariantSetting
from server.engine.assembly import build_engine
from server.engine.detokenize import Vocabulary
from server.engine.engine import Engine
from server.evidence import evidence_of_variants
from server.metrics import Metrics
from server.planned import Planned, attach_substitutes

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
    """The file it was read from, `cached` or `computed`."""
    model: str
    """What --model said."""


def start(
    settings: Settings, progress: Progress, on_death: Callable[[], None] = lambda: None
) -> Started:
    """Load the model, find its plan and build what serves it.

    Raises:
        ModelError, PlanError, BudgetError, SubstituteError, CalibrationError, ImportanceError,
            DivergenceError, VariantError, QuantisationError, EngineConfigError, SettingsError:
            with one sentence for the user.
    """
    base = load_base_model(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
    )
    _check_device(settings, base.device)
    if settings.served_model_name:
        base = replace(base, name=settings.served_model_name)
    plan, substitutes, origin = find_plan(settings, base, progress)
    planned = plan_variants(settings, base, plan, substitutes)
    variants = make_variants(settings, planned)
    _quantise(settings, base)
    attach_substitutes(base, planned)
    if four_bit_layers(base.model):
        quantise_substitutes(base)
    engine = build_engine(base, variants, settings.engine(base.device), on_death)
    service = make_service(settings, base, planned, engine)
    app = create_app(
        service,
        [part.router for part in (completions, chat, models, tokenizer, operations)],
        api_keys=settings.api_key,
        cors_origins=settings.cors_origin,
        max_body_size=settings.max_body_size,
    )
    return Started(app, service, engine, plan, origin, settings.model)


def _check_device(settings: Settings, device: torch.device) -> None:
    """Refuse eight bits where they do not run, before a plan is computed."""
    if settings.quantization not in ("int8", "float8"):
        return
    if device.type != "cuda":
        raise SettingsError(
            f"--quantization {settings.quantization} runs on CUDA devices and this model is on "
            f"{device.type}; on a CPU, --quantization int4 runs"
        )
    if importlib.util.find_spec("triton") is None:
        raise SettingsError(f"--quantization {settings.quantization} needs the package triton")


def _quantise(settings: Settings, base: BaseModel) -> None:
    """Put the weights into eight or four bits if that was asked for, or into four if that is free
    of loss and faster."""
    automatic = settings.quantization == "auto" and settings.dtype == "auto"
    if settings.quantization in ("int8", "float8"):
        from server.engine import eight_bits  # Triton exists on GPU machines only

        eight_bits.quantise(base.model, settings.quantization)
        logger.info("weights: %s with a scale for each output", settings.quantization)
    elif settings.quantization == "int4" or (
        automatic and runs_here(base.device) and is_on_grid(base.model)
    ):
        quantise(base.model)
        logger.info("weights: int4 in groups of 32; activations: bfloat16")


def find_plan(
    settings: Settings, base: BaseModel, progress: Progress
) -> tuple[Plan, Substitutes | None, str]:
    """Return the plan, its substitutes, and where it came from: the file, the cache, or computed
    now."""
    choice = chosen(
        settings.drop, settings.max_kl, settings.min_agreement, settings.max_perplexity_ratio
    )
    if settings.plan is not None:
        plan, substitutes = read_with_substitutes(Path(settings.plan))
        plan.check_fits(base)
        return plan if choice is None else _chosen(plan, choice), substitutes, settings.plan
    request = PlanRequest(
        calibration=settings.calibration or (SELF,), protected=parse_layers(settings.protect)
    )
    choice = choice or DEFAULT_BUDGET
    cache = PlanCache(cache_folder() / "plans")
    plan, origin = cache.load_or_compute(base, request, progress, _wanted(settings, choice))
    return _chosen(plan, choice), cache.substitutes(plan), origin


def _chosen(plan: Plan, choice: str | Budget) -> Plan:
    """Return the plan with what was chosen dropped; say so if a budget allows nothing."""
    chosen_plan = plan.choosing(choice)
    if chosen_plan.budget is not None and chosen_plan.drop == 0:
        logger.warning(
            "the budget (%s) allows no layer to be dropped, so %s is the full model; widen it, or "
            "make a better plan with `attndrop plan --strategy greedy --substitutes linear`",
            chosen_plan.budget,
            PRUNED,
        )
    return chosen_plan


def _wanted(settings: Settings, choice: str | Budget) -> Wanted:
    """Return the depths of all variants of the plan, so that what each costs is known."""
    asked = [VariantSetting.parse(text) for text in settings.variant]
    return Wanted.by(choice).along(tuple(each.drop or "" for each in asked if each.plan is None))


def plan_variants(
    settings: Settings, base: BaseModel, plan: Plan, substitutes: Substitutes | None
) -> dict[str, Planned]:
    """Return what `full`, `pruned` and whatever --variant adds drop, by name.

    Raises:
        PlanError, SubstituteError: another plan is not usable or not of this model.
        SettingsError: a name is given twice.
    """
    found = {FULL: Planned(plan.with_drop(0), None), PRUNED: Planned(plan, substitutes)}
    for setting in map(VariantSetting.parse, settings.variant):
        if setting.name in found:
            raise SettingsError(f"--variant names {setting.name!r} twice")
        found[setting.name] = _planned(setting, base, found[PRUNED])
    return found


def _planned(setting: VariantSetting, base: BaseModel, served: Planned) -> Planned:
    plan, substitutes = served.plan, served.substitutes
    if setting.plan is not None:
        plan, substitutes = read_with_substitutes(Path(setting.plan))
        plan.check_fits(base)
    return Planned(plan if setting.drop is None else plan.dropping(setting.drop), substitutes)


def make_variants(settings: Settings, planned: Mapping[str, Planned]) -> Variants:
    """Return the variants to serve; say it if some cannot be in one batch."""
    found = [
        Variant(name, each.plan.kept_layers(), each.plan.dropped().mlps)
        for name, each in planned.items()
    ]
    variants = Variants(len(planned[FULL].plan.kept_layers()), found)
    for chain in variants.chains[1:]:
        logger.info(
            "what %s drops does not nest with the other variants: requests run in passes of their "
            "own, which take turns",
            " and ".join(chain),
        )
    if settings.default_variant.lower() not in variants:
        names = ", ".join(variant.name for variant in variants)
        raise SettingsError(
            f"--default-variant {settings.default_variant!r} is not one of: {names}"
        )
    return variants


def make_service(
    settings: Settings,
    base: BaseModel,
    planned: Mapping[str, Planned],
    engine: Engine,
) -> Service:
    """Return what the endpoints share."""
    plan, evidence = planned[PRUNED].plan, evidence_of_variants(planned)
    return Service(
        engine=engine,
        metrics=Metrics(
            base.name, engine.describe(), evidence, _plan_labels(plan), __version__, engine.stats
        ),
        tokenizer=base.tokenizer,
        vocabulary=Vocabulary(base.tokenizer),
        vocabulary_size=int(base.model.config.get_text_config().vocab_size),
        end_tokens=base.end_tokens,
        model_name=base.name,
        model_fingerprint=base.fingerprint,
        plan_id=plan.id,
        plan_ids={name: each.plan.id for name, each in planned.items()},
        evidence=evidence,
        version=__version__,
        default_variant=settings.default_variant.lower(),
        created=int(time.time()),
    )


def _plan_labels(plan: Plan) -> dict[str, str]:
    """Return what the metrics say of the plan."""
    return {
        "plan_id": plan.id,
        "strategy": plan.strategy,
        "substitutes": "none" if plan.substitutes is None else plan.substitutes.kind,
        "budget": "none" if plan.budget is None else str(plan.budget),
    }
