"""A client's request as it is passed on: what is asked of an upstream, and what is changed back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.api.errors import bad_request
from server.api.front import VARIANT_HEADER
from server.gateway.upstream import Upstream

_MAX_MODEL = 512


@dataclass(frozen=True, slots=True)
class Call:
    """A request body with its variant resolved."""

    path: str
    body: Mapping[str, Any]
    variant: str
    model: str
    """What the answer calls the model: as the client did."""
    headers: Mapping[str, str]
    """What upstreams get beside the body: the request's id, tracing, the upstreams' key."""

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def wants_usage(self) -> bool:
        return bool((self.body.get("stream_options") or {}).get("include_usage"))

    def body_for(self, upstream: Upstream) -> bytes:
        """Return the body with the upstream's own name of the model.

        A stream always ends with its usage, from which tokens are counted.
        """
        assert upstream.identity is not None
        body = {**self.body, "model": upstream.identity.model}
        if self.streams:
            body["stream_options"] = {
                **(self.body.get("stream_options") or {}),
                "include_usage": True,
            }
        return json.dumps(body, ensure_ascii=False).encode()

    def headers_for(self, upstream: Upstream) -> dict[str, str]:
        headers = {**self.headers, "Content-Type": "application/json"}
        assert upstream.identity is not None
        if upstream.identity.is_attndrop:
            headers[VARIANT_HEADER] = self.variant
        return headers


def read_body(raw: bytes) -> dict[str, Any]:
    """Return a request's body, of which only what the gateway itself needs is checked.

    Raises:
        ApiError: 400.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(body, dict):
        raise bad_request("the body must be a JSON object")
    model = body.get("model")
    if model is not None and not (isinstance(model, str) and len(model) <= _MAX_MODEL):
        raise bad_request(f"'model' must be a string of at most {_MAX_MODEL} characters", "model")
    if body.get("stream") not in (None, True, False):
        raise bad_request("'stream' must be true or false", "stream")
    if not isinstance(body.get("stream_options"), dict | None):
        raise bad_request("'stream_options' must be an object", "stream_options")
    if body.get("stream_options") is not None and not body.get("stream"):
        raise bad_request(
            "'stream_options' is only allowed when 'stream' is true", "stream_options"
        )
    return body
