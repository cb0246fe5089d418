"""GET /v1/models: the model and each of its variants, for clients that cannot set headers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from server.api.service import Service

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    return {"object": "list", "data": [_entry(service, name) for name in service.model_ids]}


@router.get("/v1/models/{model_id:path}")
async def get_model(model_id: str, request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    service.variant_of_model(model_id)
    return _entry(service, model_id)


def _entry(service: Service, name: str) -> dict[str, Any]:
    variant = service.variant_of_model(name) or service.default_variant
    evidence = service.evidence[variant]
    info = next(info for info in service.engine.describe() if info.name == variant)
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "attndrop",
        "root": service.model_name,
        "max_model_len": service.engine.limit(variant),
        "variant": {
            "name": variant,
            "plan": service.plan_id,
            "attention_layers": info.attention_layers,
            "dropped_layers": list(info.dropped_layers),
            "kv_bytes_per_token": info.kv_bytes_per_token,
            "quality": None if evidence.quality is None else asdict(evidence.quality),
            "substitutes": {
                "parameters": evidence.substitute_parameters,
                "bytes": evidence.substitute_bytes,
            },
        },
    }
