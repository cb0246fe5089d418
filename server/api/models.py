"""GET /v1/models: the model and each of its variants, for clients that cannot set headers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server.api.front import Front

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    service: Front = request.app.state.service
    return {"object": "list", "data": [_entry(service, name) for name in service.model_ids]}


@router.get("/v1/models/{model_id:path}")
async def get_model(model_id: str, request: Request) -> dict[str, Any]:
    service: Front = request.app.state.service
    service.variant_of_model(model_id)
    return _entry(service, model_id)


def _entry(service: Front, name: str) -> dict[str, Any]:
    variant = service.variant_of_model(name) or service.default_variant
    facts = service.facts(variant)
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "attndrop",
        "root": service.model_name,
        **facts,
        "variant": {"name": variant, "plan": service.plan_id, **facts["variant"]},
    }
