"""A load generator: streaming completions over HTTP, timed from the client's side.

Every request has a fixed number of prompt and generated tokens (random token ids, `ignore_eos`),
so that variants and peers do the same work.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

VARIANT_HEADER = "X-Model-Variant"


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent."""

    requests: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    vocabulary: int
    rate: float | None = None
    """Poisson arrivals a second; None sends the next request when one ends."""
    seed: int = 0

    def prompts(self) -> list[list[int]]:
        random_tokens = random.Random(self.seed)
        return [
            [random_tokens.randrange(10, self.vocabulary) for _ in range(self.prompt_tokens)]
            for _ in range(self.requests)
        ]

    def arrivals(self) -> list[float]:
        """Return when each request may be sent, in seconds."""
        if self.rate is None:
            return [0.0] * self.requests
        random_gaps = random.Random(self.seed)
        times = [0.0]
        while len(times) < self.requests:
            times.append(times[-1] + random_gaps.expovariate(self.rate))
        return times


@dataclass(frozen=True, slots=True)
class Timed:
    """When a request was sent and when each of its tokens arrived, in seconds."""

    sent: float
    tokens: tuple[float, ...]
    cached_tokens: int = 0
    """Of its prompt, as the server's usage says."""

    @property
    def first(self) -> float:
        return self.tokens[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of a load."""

    requests: tuple[Timed, ...]
    seconds: float
    peak_kv_bytes: float
    """Highest KV-cache bytes in use that were seen while it ran."""

    @property
    def tokens_per_second(self) -> float:
        return sum(len(request.tokens) for request in self.requests) / self.seconds

    def first_token(self, quantile: float) -> float:
        return at_quantile([request.first for request in self.requests], quantile)

    def inter_token(self, quantile: float) -> float:
        return at_quantile([gap for request in self.requests for gap in request.gaps], quantile)


def at_quantile(values: Sequence[float], quantile: float) -> float:
    """Return the value at a quantile, the nearest one above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]


async def run_load(url: str, variant: str, load: Load) -> Measured:
    """Send a load to one variant and return what was seen."""
    places = asyncio.Semaphore(load.concurrency)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        watch = _KvWatch()
        watching = asyncio.create_task(watch.run(client, variant))
        start = time.perf_counter()
        timed = await asyncio.gather(
            *(
                _one_request(client, variant, prompt, load.output_tokens, places, start + arrival)
                for prompt, arrival in zip(load.prompts(), load.arrivals(), strict=True)
            )
        )
        seconds = time.perf_counter() - start
        watching.cancel()
    return Measured(tuple(timed), seconds, watch.peak)


async def _one_request(
    client: httpx.AsyncClient,
    variant: str,
    prompt: list[int],
    output_tokens: int,
    places: asyncio.Semaphore,
    not_before: float,
) -> Timed:
    await asyncio.sleep(max(0.0, not_before - time.perf_counter()))
    async with places:
        return await send(client, variant, prompt, output_tokens)


async def send(
    client: httpx.AsyncClient, variant: str, prompt: list[int], output_tokens: int
) -> Timed:
    """Send one streamed request and note when its tokens arrive.

    Raises:
        RuntimeError: the answer was an error or had another number of tokens.
    """
    body = {
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = time.perf_counter()
    arrived: list[float] = []
    usage: dict[str, Any] = {}
    async with client.stream(
        "POST", "/v1/completions", json=body, headers={VARIANT_HEADER: variant}
    ) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(line)
            if event["choices"]:
                arrived.append(time.perf_counter())
            usage = event["usage"] or usage
    if len(arrived) != output_tokens:
        raise RuntimeError(f"{len(arrived)} tokens arrived where {output_tokens} were asked for")
    return Timed(sent, tuple(arrived), usage["prompt_tokens_details"]["cached_tokens"])


class _KvWatch:
    """Remembers the most KV-cache bytes that /metrics showed."""

    def __init__(self) -> None:
        self.peak = 0.0

    async def run(self, client: httpx.AsyncClient, variant: str) -> None:
        while True:
            self.peak = max(self.peak, await kv_bytes(client, variant))
            await asyncio.sleep(0.25)


async def kv_bytes(client: httpx.AsyncClient, variant: str) -> float:
    """Return the KV-cache bytes that a variant's requests own now, from /metrics."""
    text = (await client.get("/metrics")).text
    for line in text.splitlines():
        if line.startswith("attndrop_kv_cache_used_bytes{") and f'variant="{variant}"' in line:
            return float(line.rsplit(" ", 1)[1])
    raise RuntimeError(f"/metrics has no KV bytes for {variant!r}")
