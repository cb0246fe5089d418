"""Clients of the shared server."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.api.calls import tokens_of
from tests.live import LiveServer


@pytest.fixture(scope="session")
def http(live: LiveServer) -> Iterator[httpx.Client]:
    """A plain HTTP client of the shared server."""
    with live.client() as client:
        yield client


@pytest.fixture(scope="session")
def end_token(http: httpx.Client) -> int:
    """The token with which the model ends its text."""
    (token,) = tokens_of(http, http.get("/tokenizer_info").json()["eos_token"])
    return token
