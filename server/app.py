"""The HTTP application: routes, and what wraps every one of them.

    request id -> CORS -> API key -> body limit -> routes

Built from a `Front`, so tests and the command line start the same thing.
"""

from __future__ import annotations

import hmac
import re
import uuid
from collections.abc import Sequence

from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.answers import SEND_BODY, ClientLeftError
from server.api.errors import ApiError, install_handlers, too_large, unauthorized
from server.api.front import VARIANT_HEADER, Front

REQUEST_ID_HEADER = "X-Request-Id"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"})


def create_app(
    service: Front,
    routers: Sequence[APIRouter],
    *,
    api_keys: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    max_body_size: int = 4 << 20,
) -> FastAPI:
    """Return the application for one front, with the endpoints that it has."""
    app = FastAPI(title="attndrop", version=service.version, openapi_url="/openapi.json")
    app.state.service = service
    for router in routers:
        app.include_router(router)
    install_handlers(app)
    app.add_exception_handler(ClientLeftError, _client_left)
    app.add_middleware(_BodyLimit, limit=max_body_size, service=service)
    if api_keys:
        app.add_middleware(_ApiKeys, keys=api_keys, service=service)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[VARIANT_HEADER, REQUEST_ID_HEADER],
        )
    app.add_middleware(_RequestId)
    return app


async def _client_left(*_: object) -> JSONResponse:
    """Nobody reads this; 499 is what access logs call it since nginx."""
    return JSONResponse({}, 499)


class _ApiKeys:
    """Lets requests in that carry one of the keys, compared in constant time."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], service: Front) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS or self._holds_key(scope):
            await self._app(scope, receive, send)
            return
        self._service.metrics.refused("unauthorized")
        await _answer(unauthorized(), scope, receive, send)

    def _holds_key(self, scope: Scope) -> bool:
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        matches = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        return scheme.lower() == "bearer" and any(matches)


class _RequestId:
    """Returns the client's X-Request-Id, or one of our own if it sent none that is usable."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {}).update({"request_id": request_id, SEND_BODY: send})

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class _BodyLimit:
    """Answers 413 to bodies over the limit, without reading them to the end."""

    def __init__(self, app: ASGIApp, limit: int, service: Front) -> None:
        self._app = app
        self._limit = limit
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdigit() or int(declared) > self._limit:
            await _answer(self._refusal(), scope, receive, send)
            return
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise HTTPException(413, str(self._refusal()))
            return message

        await self._app(scope, limited_receive, send)

    def _refusal(self) -> ApiError:
        self._service.metrics.refused("invalid")
        return too_large(self._limit)


async def _answer(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    response = JSONResponse(error.body, error.status, headers=error.headers)
    await response(scope, receive, send)
