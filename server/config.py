"""The settings of `attndrop serve`: one place for names, defaults and limits.

Every setting is a command-line option and an environment variable (ATTNDROP_PORT for --port);
where both are given, the option wins. Lists are separated by commas in the environment.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import AfterValidator, BeforeValidator, Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from pruning.loading import EMBEDDED_MODEL, cache_folder
from pruning.plan import is_drop
from pruning.variants import FULL
from server.engine.assembly import AttentionChoice, EngineConfig, KvCacheDtype, default_limits
from server.engine.scheduler import Limits

PRUNED = "pruned"
"""The variant that drops what the plan says."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)


def parse_bytes(value: Any) -> Any:
    """Return the bytes that `4GiB`, `500MB` or `1048576` mean.

    Raises:
        ValueError: the text is not a size.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if not match:
        raise ValueError(f"{value!r} is not a size; write bytes, or a number with KB, MiB, GiB ...")
    return int(float(match[1]) * {**_UNITS, **_BINARY_UNITS}[(match[2] or "").lower()])


def _split(value: Any) -> Any:
    """Return the parts of a comma-separated text, as environment variables hold lists."""
    return tuple(part for part in value.split(",") if part) if isinstance(value, str) else value


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Texts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


def _usable_keys(keys: tuple[str, ...]) -> tuple[str, ...]:
    if any(not key or not key.isascii() or key != key.strip() for key in keys):
        raise ValueError("an API key must be plain ASCII without spaces around it")
    return keys


# What can be set of everything that answers the API.

Host = Annotated[str, Field(description="Address to listen on.")]
Port = Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 takes a free one.")]
ApiKeys = Annotated[
    Texts,
    AfterValidator(_usable_keys),
    Field(description="A key clients must send as Bearer token. Repeatable; none: open to all."),
]
Origins = Annotated[
    Texts, Field(description="An origin whose web pages may call the API. Repeatable.")
]
BodySize = Annotated[
    Bytes, Field(gt=0, description="Largest request body, in bytes or with a unit.")
]
DrainTimeout = Annotated[
    float, Field(ge=0, description="Seconds that running requests get after SIGTERM.")
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"], Field(description="How much is logged.")
]
LOCAL, BODY_SIZE, DRAIN_SECONDS = "127.0.0.1", 4 << 20, 30


class VariantSetting(NamedTuple):
    """What --variant asks for."""

    name: str
    plan: str | None
    """A plan file; None: the plan that is served."""
    drop: str | None
    """None: the plan file's own."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what NAME=DROP, NAME=FILE or NAME=FILE:DROP asks for."""
        name, _, what = text.partition("=")
        file, _, drop = what.rpartition(":")
        if not is_drop(drop):
            return cls(name.lower(), what, None)
        return cls(name.lower(), file or None, drop)


class Settings(BaseSettings):
    """What can be set."""

    model_config = SettingsConfigDict(
        env_prefix="ATTNDROP_", extra="forbid", frozen=True, env_ignore_empty=True
    )

    model: str = Field(
        EMBEDDED_MODEL, description="Hugging Face id, checkpoint folder, or .gguf file."
    )
    served_model_name: str | None = Field(
        None, max_length=256, description="What clients call the model."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights and KV cache; auto: float32 on a CPU, else the checkpoint's."
    )
    quantization: Literal["auto", "none", "int4", "int8", "float8"] = Field(
        "auto",
        description="int4: 4-bit weights in groups of 32 and bfloat16, inputs of more than 3 "
        "rows (prompts and more than 3 requests that decode together) in 8 bits where AVX512_VNNI "
        "makes that fast, on a CPU; int8, float8: 8-bit weights with a scale for each output, on a "
        "CUDA device; auto: int4 on a CPU with --dtype auto where it holds the checkpoint's "
        "weights exactly (Q4_0 and Q4_1 GGUF), else none.",
    )
    device: str = Field("auto", description="A torch device; auto: cuda if there is one.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the checkpoint.")

    plan: str | None = Field(
        None, description="A plan file; by default taken from the cache or computed."
    )
    drop: str | None = Field(
        None,
        description="What `pruned` drops: a number of layers, a share (25%), or auto, as many as a "
        "budget allows; by default the plan file's own, else auto.",
    )
    max_kl: float | None = Field(
        None,
        description="Budget: KL from the full model, nats a token; 0.2 where no option says what "
        "to drop.",
    )
    min_agreement: float | None = Field(
        None, description="Budget: how often the most likely token is the full model's, 0 to 1."
    )
    max_perplexity_ratio: float | None = Field(
        None, description="Budget: perplexity over the full model's."
    )
    variant: Texts = Field(
        (),
        description="NAME=DROP: one more variant of the same plan, such as light=4; NAME=FILE or "
        "NAME=FILE:DROP: one of another plan of this model. Repeatable.",
    )
    default_variant: str = Field(PRUNED, description="The variant of requests that name none.")
    calibration: Texts = Field(
        (),
        description="Calibration text: self (the model writes it; the default), a file, or "
        "hf:NAME. Repeatable: equal shares of each.",
    )
    protect: str = Field("", description="Layers never dropped, such as 1,2,29. Layer 0 never is.")

    host: Host = LOCAL
    port: Port = 8000
    api_key: ApiKeys = ()
    cors_origin: Origins = ()
    max_body_size: BodySize = BODY_SIZE
    drain_timeout: DrainTimeout = DRAIN_SECONDS
    log_level: LogLevel = "info"

    kv_cache_memory: Bytes | None = Field(
        None,
        gt=0,
        description="Page pool of all variants, such as 4GiB; by default a quarter of the free "
        "memory up to 4 GiB on a CPU, 0.9 of what is left on a GPU.",
    )
    kv_cache_dtype: KvCacheDtype = Field(
        "auto",
        description="auto: the model's dtype; fp8 (or fp8_e4m3): keys and values in eight bits, "
        "half of bfloat16's bytes.",
    )
    max_model_len: int | None = Field(
        None, ge=2, description="Longest prompt and answer together, in tokens."
    )
    max_running: int | None = Field(
        None, ge=1, description="Requests computed together at most: 64 on a CPU, 256 on a GPU."
    )
    max_waiting: int = Field(
        Limits().waiting, ge=1, description="Requests queued at most; more are answered 429."
    )
    max_step_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens one step computes at most: by default 512 on a CPU, 2048 on a GPU, and "
        "8192 on a GPU with 40 GiB free while no answer is being written.",
    )
    attention_backend: AttentionChoice = Field(
        "auto", description="auto: paged (Triton) on a GPU, sdpa anywhere else."
    )
    enforce_eager: bool = Field(
        False,
        description="No compiled layers, and on a GPU no CUDA graphs: starts sooner, decodes "
        "slower.",
    )
    prefix_caching: bool = Field(
        True, description="Keep computed pages for prompts that begin alike, until they are needed."
    )

    @field_validator("variant")
    @classmethod
    def variants_are_named(cls, variants: tuple[str, ...]) -> tuple[str, ...]:
        for variant in variants:
            name, equals, drop = variant.partition("=")
            if not (name and equals and drop):
                raise ValueError(
                    f"--variant {variant!r} must be NAME=DROP, such as light=4, or NAME=FILE"
                )
            if name.lower() in (FULL, PRUNED):
                raise ValueError(f"--variant cannot redefine {name!r}; use --drop for {PRUNED!r}")
        return variants

    def engine(self, device: torch.device) -> EngineConfig:
        """Return what was set about the engine; what was not is what suits the device."""
        suitable = default_limits(device, self.max_step_tokens)
        limits = replace(
            suitable,
            scored_tokens_per_step=min(suitable.tokens_per_step, suitable.scored_tokens_per_step),
            running=self.max_running or suitable.running,
            waiting=self.max_waiting,
        )
        return EngineConfig(
            limits,
            self.kv_cache_memory,
            self.max_model_len,
            self.attention_backend,
            self.enforce_eager,
            self.prefix_caching,
            cache_folder() / "compiled",
            self.kv_cache_dtype,
        )
