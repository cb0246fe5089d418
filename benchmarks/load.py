"""A load generator: streaming completions over HTTP, timed from the client's side.

Every request has a fixed number of prompt and generated tokens (random token ids, no end of text),
so that variants and peers do the same work. Raw sockets: the generator shares the machine with
what it measures, and an HTTP client's work for each token would be part of the figure.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import uvloop

VARIANT_HEADER = "X-Model-Variant"
_KV_METRIC = "attndrop_kv_cache_used_bytes"
_WATCH_SECONDS = 0.5
_END = b"\n\n"
"""Of an event."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent."""

    requests: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    vocabulary: Sequence[int] = range(10, 10_000)
    """The tokens that prompts are made of."""
    rate: float | None = None
    """Poisson arrivals a second; None sends the next request when one ends."""
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Of one request, prompt and answer together."""
        return self.prompt_tokens + self.output_tokens

    def prompts(self) -> list[list[int]]:
        draw = random.Random(self.seed)
        return [draw.choices(self.vocabulary, k=self.prompt_tokens) for _ in range(self.requests)]

    def arrivals(self) -> list[float]:
        """Return when each request may be sent, in seconds."""
        if self.rate is None:
            return [0.0] * self.requests
        random_gaps = random.Random(self.seed)
        times = [0.0]
        while len(times) < self.requests:
            times.append(times[-1] + random_gaps.expovariate(self.rate))
        return times


def no_kv_bytes(metrics: str) -> None:
    """What is read from /metrics of a server that does not say it."""
    del metrics


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a load is sent, and what that server wants to be told."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, object] = field(default_factory=dict)
    """Beside what every server of this API is sent."""
    spelled: Callable[[list[int]], object] = list
    """How it is given a prompt of token ids."""
    kv_bytes: Callable[[str], float | None] = no_kv_bytes
    """From the text of /metrics: bytes of the KV cache in use."""


def ours(url: str, variant: str) -> Endpoint:
    """Return the endpoint of one variant on this project's server."""
    label = f'variant="{variant}"'
    return Endpoint(
        url,
        headers={VARIANT_HEADER: variant},
        body={"ignore_eos": True},
        kv_bytes=lambda metrics: metric(metrics, _KV_METRIC, label),
    )


def metric(text: str, name: str, label: str = "") -> float:
    """Return a sample of /metrics.

    Raises:
        RuntimeError: there is none of that name and label.
    """
    for line in text.splitlines():
        if line.startswith((f"{name}{{", f"{name} ")) and label in line:
            return float(line.rsplit(" ", 1)[1])
    raise RuntimeError(f"/metrics has no {name} {label}")


@dataclass(frozen=True, slots=True)
class Timed:
    """When a request was sent and when each piece of its answer arrived, in seconds."""

    sent: float
    tokens: tuple[float, ...]
    """One for each token, or fewer where a server sends several tokens at once."""
    generated: int
    """As the server's usage says."""
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
    peak_kv_bytes: float | None
    """Highest KV-cache bytes in use that were seen while it ran; None where nobody says."""

    @property
    def tokens_per_second(self) -> float:
        return sum(request.generated for request in self.requests) / self.seconds

    def first_token(self, quantile: float) -> float:
        return at_quantile([request.first for request in self.requests], quantile)

    def inter_token(self, quantile: float) -> float:
        """Return 0 where no request has two pieces."""
        gaps = [gap for request in self.requests for gap in request.gaps]
        return at_quantile(gaps, quantile) if gaps else 0.0


def at_quantile(values: Sequence[float], quantile: float) -> float:
    """Return the value at a quantile, the nearest one above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]


def sent(endpoint: Endpoint, load: Load) -> Measured:
    """Send a load, on the event loop that takes least from what is measured; see `run_load`."""
    return uvloop.run(run_load(endpoint, load))


async def run_load(endpoint: Endpoint, load: Load) -> Measured:
    """Send a load to one endpoint and return what was seen."""
    places = asyncio.Semaphore(load.concurrency)
    watch = _KvWatch()
    watching = asyncio.create_task(watch.run(endpoint))
    start = time.perf_counter()
    answers = await asyncio.gather(
        *(
            _in_its_time(endpoint, prompt, load.output_tokens, places, start + arrival)
            for prompt, arrival in zip(load.prompts(), load.arrivals(), strict=True)
        )
    )
    timed = tuple(_timed(endpoint, answer, load.output_tokens) for answer in answers)
    seconds = max(request.tokens[-1] for request in timed) - start
    if watching.done():
        watching.result()
    watching.cancel()
    return Measured(timed, seconds, watch.peak)


async def _in_its_time(
    endpoint: Endpoint,
    prompt: list[int],
    output_tokens: int,
    places: asyncio.Semaphore,
    not_before: float,
) -> _Answer:
    await asyncio.sleep(max(0.0, not_before - time.perf_counter()))
    async with places:
        return await _answer(endpoint, prompt, output_tokens)


async def send(endpoint: Endpoint, prompt: list[int], output_tokens: int) -> Timed:
    """Send one streamed request and note when its tokens arrive.

    Raises:
        RuntimeError: the answer was an error or had another number of tokens.
    """
    return _timed(endpoint, await _answer(endpoint, prompt, output_tokens), output_tokens)


async def _answer(endpoint: Endpoint, prompt: list[int], output_tokens: int) -> _Answer:
    body = {
        "prompt": endpoint.spelled(prompt),
        "max_tokens": output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **endpoint.body,
    }
    parts = urlsplit(endpoint.url)
    answer = _Answer()
    content = json.dumps(body).encode()
    transport, _ = await asyncio.get_running_loop().create_connection(
        lambda: answer, parts.hostname or "", parts.port or 80
    )
    try:
        transport.write(_head(parts.netloc, endpoint.headers, len(content)) + content)
        await answer.over
    finally:
        transport.close()
    return answer


class _Answer(asyncio.Protocol):
    """The pieces of one streamed answer, as they come.

    What they say is read when the load is over: the clients share the machine with what they
    measure, and a token costs them a fraction of what it costs to read its JSON.
    """

    def __init__(self) -> None:
        self.sent = time.perf_counter()
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.pieces: list[tuple[float, bytes]] = []
        """Up to the empty line that ends an event; the first begins with the answer's head."""
        self.rest = b""

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        *whole, self.rest = (self.rest + data).split(_END)
        self.pieces += [(now, piece) for piece in whole]
        if whole and whole[-1].endswith(b"[DONE]"):
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc  # what lacks is missed when the pieces are read
        self._end()

    def _end(self) -> None:
        if not self.over.done():
            self.over.set_result(None)


def _timed(endpoint: Endpoint, answer: _Answer, output_tokens: int) -> Timed:
    """Read an answer that is over."""
    arrived: list[float] = []
    usage: dict[str, Any] = {}
    for moment, event in _events(endpoint, answer):
        if "error" in event:
            raise RuntimeError(f"{endpoint.url} answered {event}")
        if event["choices"]:
            arrived.append(moment)
        usage = event.get("usage") or usage
    generated = usage.get("completion_tokens", 0)
    if generated != output_tokens:
        raise RuntimeError(f"{generated} tokens came from {endpoint.url}, not {output_tokens}")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    # A last event without a token, which some servers send, is none of its pieces.
    return Timed(answer.sent, tuple(arrived[:generated]), generated, cached)


def _events(endpoint: Endpoint, answer: _Answer) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield an answer's events and when they came. Servers send each of them whole, within one
    chunk."""
    beginning = answer.pieces[0][1] if answer.pieces else answer.rest
    status, _, told = beginning.partition(b"\r\n")
    if b" 200 " not in status:
        message = told[:2000].decode(errors="replace")
        raise RuntimeError(f"{endpoint.url} answered {status.decode(errors='replace')}: {message}")
    for moment, piece in answer.pieces:
        line = piece.rsplit(b"\n", 1)[-1]  # before it stand the chunk's length and, once, the head
        if line.startswith(b"data: {"):
            yield moment, json.loads(line[6:])


def _head(host: str, headers: Mapping[str, str], length: int) -> bytes:
    lines = {"Host": host, "Content-Type": "application/json", "Content-Length": str(length)}
    fields = "".join(f"{name}: {value}\r\n" for name, value in {**lines, **headers}.items())
    return f"POST /v1/completions HTTP/1.1\r\n{fields}Connection: close\r\n\r\n".encode()


class _KvWatch:
    """Remembers the most KV-cache bytes that /metrics showed."""

    def __init__(self) -> None:
        self.peak: float | None = None

    async def run(self, endpoint: Endpoint) -> None:
        if endpoint.kv_bytes is no_kv_bytes:
            return
        async with httpx.AsyncClient(base_url=endpoint.url, timeout=600) as client:
            while True:
                seen = endpoint.kv_bytes((await client.get("/metrics")).text)
                self.peak = max(self.peak or 0.0, seen or 0.0)
                await asyncio.sleep(_WATCH_SECONDS)
