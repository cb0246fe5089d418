"""POST /tokenize, POST /detokenize, GET /tokenizer_info: what lm-evaluation-harness asks for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server.api.schema import DetokenizeRequest, TokenizeRequest
from server.api.service import Service

router = APIRouter()


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    variant = service.resolve_variant(body.model, request.headers)
    (tokens,) = await service.tokenize([body.prompt], special=body.add_special_tokens)
    return {
        "count": len(tokens),
        "max_model_len": service.engine.limit(variant),
        "tokens": tokens,
    }


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    service: Service = request.app.state.service
    service.resolve_variant(body.model, request.headers)
    service.check_tokens(body.tokens, "tokens")
    raw = b"".join(service.vocabulary.token_bytes(token) for token in body.tokens)
    return {"prompt": raw.decode("utf-8", errors="replace")}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    tokenizer = request.app.state.service.tokenizer
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "unk_token": tokenizer.unk_token,
        "chat_template": tokenizer.chat_template,
        "add_bos_token": bool(getattr(tokenizer, "add_bos_token", False)),
    }
