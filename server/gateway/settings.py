"""The settings of `attndrop gateway`.

Every setting is a command-line option and an environment variable (ATTNDROP_GATEWAY_PORT for
--port). In the environment, several upstreams are separated by spaces, other lists by commas.
"""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from pruning.variants import is_name
from server.config import (
    BODY_SIZE,
    DRAIN_SECONDS,
    LOCAL,
    ApiKeys,
    BodySize,
    DrainTimeout,
    Host,
    LogLevel,
    Origins,
    Port,
    Texts,
)

EVERY = "*"
"""The name of a pool whose servers hold every variant."""


def _words(value: Any) -> Any:
    return tuple(value.split()) if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)]


class GatewaySettings(BaseSettings):
    """What can be set."""

    model_config = SettingsConfigDict(
        env_prefix="ATTNDROP_GATEWAY_", extra="forbid", frozen=True, env_ignore_empty=True
    )

    upstream: Words = Field(
        (),
        description="VARIANT=URL,URL: the servers of a variant; '*=URL,URL' for attndrop servers, "
        "which hold every variant. Repeatable.",
    )
    upstream_api_key: str | None = Field(None, description="The Bearer token for the upstreams.")
    model_name: str | None = Field(
        None, max_length=256, description="What clients call the model; by default as upstream."
    )
    default_variant: str | None = Field(
        None, description="The variant of requests that name none; pruned where there is one."
    )
    split: Texts = Field(
        (), description="VARIANT=WEIGHT,...: shares of the requests that name no variant."
    )
    sticky_header: str = Field(
        "X-Session-Id", description="Requests with the same value of it get the same variant."
    )

    connect_timeout: float = Field(2, gt=0, description="Seconds to connect to an upstream.")
    silence_timeout: float = Field(
        60, gt=0, description="Seconds between two events of a stream before it counts as broken."
    )
    request_timeout: float = Field(
        600, gt=0, description="Seconds for an answer that is not streamed."
    )
    health_interval: float = Field(2, gt=0, description="Seconds between health checks.")
    start_timeout: float = Field(
        600, ge=0, description="Seconds to wait for one server of every pool at the start."
    )

    host: Host = LOCAL
    port: Port = 8080
    api_key: ApiKeys = ()
    cors_origin: Origins = ()
    max_body_size: BodySize = BODY_SIZE
    drain_timeout: DrainTimeout = DRAIN_SECONDS
    log_level: LogLevel = "info"

    @field_validator("split")
    @classmethod
    def split_by_commas(cls, parts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(piece for part in parts for piece in part.split(",") if piece)

    @model_validator(mode="after")
    def parts_are_readable(self) -> GatewaySettings:
        if not self.upstream:
            raise ValueError("--upstream is required, such as full=http://127.0.0.1:8000")
        if not self.pools() or not (self.weights() or not self.split):
            raise ValueError("--upstream and --split must name something")
        return self

    def pools(self) -> dict[str, tuple[str, ...]]:
        """Return the URLs of every pool.

        Raises:
            ValueError: malformed.
        """
        pools: dict[str, tuple[str, ...]] = {}
        for given in self.upstream:
            name, _, urls = given.partition("=")
            name = name.lower()
            if name != EVERY and not is_name(name):
                raise ValueError(f"--upstream {given!r} must be VARIANT=URL,URL or '*=URL,URL'")
            found = tuple(url.rstrip("/") for url in urls.split(",") if url)
            if not found or not all(_is_http(url) for url in found):
                raise ValueError(f"--upstream {given!r} must list URLs like http://host:8000")
            pools[name] = (*pools.get(name, ()), *found)
        if EVERY in pools and len(pools) > 1:
            raise ValueError("--upstream '*=...' holds every variant; give no other beside it")
        return pools

    def weights(self) -> dict[str, float]:
        """Return the weight of every variant in --split.

        Raises:
            ValueError: malformed.
        """
        weights: dict[str, float] = {}
        for part in self.split:
            name, _, weight = part.partition("=")
            if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", weight):
                raise ValueError(f"--split {part!r} must be VARIANT=WEIGHT, such as full=10")
            weights[name.lower()] = float(weight)
        if self.split and not sum(weights.values()):
            raise ValueError("--split needs a weight above 0")
        return weights


def _is_http(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("http", "https") and bool(parts.hostname)
