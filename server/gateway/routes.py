"""The endpoints that pass through."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.api.answers import ClientLeftError, EventStream, Write, unless_client_leaves
from server.api.errors import ApiError, unavailable
from server.api.front import VARIANT_HEADER
from server.app import REQUEST_ID_HEADER
from server.gateway.call import Call, read_body
from server.gateway.forward import stream
from server.gateway.front import GatewayFront
from server.gateway.tally import Tally
from server.gateway.upstream import Upstream

router = APIRouter()

_BUSY = 429
_SERVER_ERROR = 500
_PASSED_ON = ("traceparent", "tracestate")


@router.post("/v1/completions")
@router.post("/v1/chat/completions")
async def generate(request: Request) -> Response:
    """Pass a completion through, streamed or not."""
    front: GatewayFront = request.app.state.service
    if front.draining:
        front.metrics.refused("draining")
        raise unavailable("the gateway is shutting down; try another one", "draining")
    call = await _call(front, request)
    headers = {VARIANT_HEADER: call.variant}
    tally = Tally(front.metrics, call.variant)
    if call.streams:
        return await _streamed(front, request, call, tally, headers)
    return await _whole(front, request, call, tally, headers)


@router.post("/tokenize")
@router.post("/detokenize")
async def pass_through(request: Request) -> JSONResponse:
    """Pass on what an upstream answers at once."""
    front: GatewayFront = request.app.state.service
    call = await _call(front, request)
    return JSONResponse(await front.forwarder.answer(call, front.pools[call.variant]))


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> JSONResponse:
    front: GatewayFront = request.app.state.service
    variant = front.resolve_variant(None, request.headers)
    call = _made(front, request, {}, variant)
    return JSONResponse(await front.forwarder.answer(call, front.pools[variant], "GET"))


async def _call(front: GatewayFront, request: Request) -> Call:
    body = read_body(await request.body())
    return _made(front, request, body, front.resolve_variant(body.get("model"), request.headers))


def _made(front: GatewayFront, request: Request, body: dict[str, Any], variant: str) -> Call:
    passed = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
    headers = {
        **passed,
        **front.upstream_headers,
        REQUEST_ID_HEADER: str(request.state.request_id),
    }
    model = body.get("model") or front.model_name
    return Call(request.url.path, body, variant, model, headers)


async def _streamed(
    front: GatewayFront, request: Request, call: Call, tally: Tally, headers: dict[str, str]
) -> Response:
    pool = front.pools[call.variant]
    tried: set[Upstream] = set()
    try:
        opening = front.forwarder.open(call, pool, tried)
        opened = await unless_client_leaves(request, opening)
    except (ApiError, ClientLeftError) as error:
        _count(front, tally, error)
        raise

    async def write_events(write: Write) -> None:
        async with aclosing(stream(call, pool, opened, tried, front.forwarder, tally)) as events:
            async for event in events:
                await write(event)

    return EventStream(write_events, headers)


async def _whole(
    front: GatewayFront, request: Request, call: Call, tally: Tally, headers: dict[str, str]
) -> Response:
    try:
        asking = front.forwarder.answer(call, front.pools[call.variant])
        answer = await unless_client_leaves(request, asking)
    except (ApiError, ClientLeftError) as error:
        _count(front, tally, error)
        raise
    for choice in answer.get("choices") or ():
        tally.choice(choice)
    tally.usage(answer.get("usage") or {})
    tally.ended("stop")
    return JSONResponse({**answer, "model": call.model}, headers=headers)


def _count(front: GatewayFront, tally: Tally, error: ApiError | ClientLeftError) -> None:
    """Count a request that was not answered; one at fault itself is counted with its error."""
    if isinstance(error, ClientLeftError):
        tally.ended("abort")
    elif error.status == _BUSY:
        front.metrics.refused("queue_full")
    elif error.status >= _SERVER_ERROR:
        tally.ended("error")
