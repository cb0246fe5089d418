"""What operators ask: /health, /ready, /version, /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.api.errors import unavailable
from server.api.front import Front

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 while requests can be answered, draining included; else 503."""
    service: Front = request.app.state.service
    if not service.alive:
        raise service.dead()
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 while new requests are taken."""
    service: Front = request.app.state.service
    if service.draining:
        raise unavailable("the server is shutting down", "draining")
    return await health(request)


@router.get("/version")
async def version(request: Request) -> dict[str, str]:
    return {"version": request.app.state.service.version}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    service: Front = request.app.state.service
    body, content_type = service.metrics.render(request.headers.get("accept"))
    return Response(body, media_type=content_type)
