"""What every front has that answers the API: the names of its variants, metrics, its state.

Two things are a front: `Service`, with an engine behind it, and the gateway, with other servers
behind it. Endpoints that need no more than this serve both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers

from server.api.errors import ApiError, bad_request, model_not_found
from server.metrics import RequestMetrics

VARIANT_HEADER = "X-Model-Variant"


@dataclass(slots=True, kw_only=True)
class Front(ABC):
    """The state of one server. Made once at start; only `draining` changes."""

    metrics: RequestMetrics
    model_name: str
    plan_id: str | None
    """None where it is not known."""
    version: str
    default_variant: str
    created: int
    """Unix time, for the models list."""
    draining: bool = field(default=False)

    @property
    @abstractmethod
    def variant_names(self) -> Sequence[str]:
        """The variants that requests can ask for."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether requests can be answered at all."""

    @abstractmethod
    def dead(self) -> ApiError:
        """Return what is answered while `alive` is false."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether any request is being answered."""

    @abstractmethod
    def facts(self, variant: str) -> dict[str, Any]:
        """Return what the models list says of a variant beside its names: `max_model_len`, and
        under `variant` what is known of its layers."""

    @property
    def model_ids(self) -> list[str]:
        """Every name a client may use: the model's own, and one for each variant."""
        return [self.model_name, *(f"{self.model_name}:{name}" for name in self.variant_names)]

    def resolve_variant(self, model: str | None, headers: Headers) -> str:
        """Return the variant that a model id and the variant header ask for together.

        Raises:
            ApiError: 404 for an unknown model; 400 for an unknown variant or a contradiction.
        """
        named = None if model is None else self.variant_of_model(model)
        asked = self._variant_of_header(headers)
        if named and asked and named != asked:
            raise bad_request(
                f"the header {VARIANT_HEADER} says {asked!r} but the model id says {named!r}; "
                "send one of them, or the same in both",
                param="model",
                code="variant_conflict",
            )
        return named or asked or self.variant_of_unnamed(headers)

    def variant_of_unnamed(self, headers: Headers) -> str:
        """Return the variant of a request that names none."""
        return self.default_variant

    def variant_of_model(self, model: str) -> str | None:
        """Return the variant that a model id names; the bare model name says nothing.

        Raises:
            ApiError: 404 for a name that this server does not have.
        """
        if model not in self.model_ids:
            raise model_not_found(model, self.model_ids)
        return model[len(self.model_name) + 1 :] or None

    def _variant_of_header(self, headers: Headers) -> str | None:
        asked = {value.strip().lower() for value in headers.getlist(VARIANT_HEADER)}
        if not asked:
            return None
        choices = list(self.variant_names)
        if len(asked) > 1 or not asked <= set(choices):
            raise bad_request(
                f"the header {VARIANT_HEADER} must be one of: {', '.join(choices)}; "
                f"not {', '.join(sorted(asked))[:200]!r}",
                param=VARIANT_HEADER,
                code="unknown_variant",
            )
        return asked.pop()
