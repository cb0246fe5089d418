"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jinja2
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.api.answers import (
    EventStream,
    Json,
    WriteEvents,
    json_event,
    unless_client_leaves,
)
from server.api.chunks import Chunks, write_chunks
from server.api.errors import bad_request
from server.api.front import VARIANT_HEADER
from server.api.generation import ChoiceSpec, Delta, Generation, Shown
from server.api.logprobs import chat_logprobs
from server.api.params import choice_params
from server.api.schema import ChatCompletionRequest
from server.api.service import Service
from server.api.usage import Usage
from server.engine.request import FinishReason

router = APIRouter()


@dataclass(frozen=True, slots=True)
class _Call:
    """A request with everything resolved."""

    service: Service
    body: ChatCompletionRequest
    variant: str
    prompt: tuple[int, ...]
    id: str
    created: int

    def header(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.body.model or self.service.model_name,
            "system_fingerprint": self.service.system_fingerprint(self.variant),
        }

    def logprobs(self, shown: Sequence[Shown]) -> dict[str, Any] | None:
        return chat_logprobs(self.service.vocabulary, shown) if self.body.logprobs else None


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    call = _Call(
        service=service,
        body=body,
        variant=service.resolve_variant(body.model, request.headers),
        prompt=await _prompt(service, body),
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
    )
    generation = Generation(service, call.variant, call.id, _specs(call))
    headers = {VARIANT_HEADER: call.variant}
    if body.stream:
        return EventStream(_events(call, generation), headers)
    answer = await unless_client_leaves(request, _collect(call, generation))
    return JSONResponse(answer, headers=headers)


async def _prompt(service: Service, body: ChatCompletionRequest) -> tuple[int, ...]:
    """Return the tokens of the conversation in the model's chat format."""
    if not service.tokenizer.chat_template:
        raise bad_request(
            f"{service.model_name} has no chat template; use /v1/completions", "messages"
        )
    messages = [
        {"role": "system" if m.role == "developer" else m.role, "content": m.text}
        for m in body.messages
    ]
    try:
        text = service.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateError as error:
        raise bad_request(f"the chat template refused the messages: {error}", "messages") from error
    (tokens,) = await service.tokenize([str(text)], special=bool(body.add_special_tokens))
    return tokens


def _specs(call: _Call) -> list[ChoiceSpec]:
    body = call.body
    asked = body.max_completion_tokens or body.max_tokens
    room = call.service.engine.limit(call.variant) - len(call.prompt)
    params = choice_params(
        call.service,
        body,
        count=body.n or 1,
        max_tokens=asked or max(1, room),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return [ChoiceSpec(call.prompt, choice, body.stops, None) for choice in params]


async def _collect(call: _Call, generation: Generation) -> Json:
    count = call.body.n or 1
    texts: list[list[str]] = [[] for _ in range(count)]
    shown: list[list[Shown]] = [[] for _ in range(count)]
    finishes: list[FinishReason | None] = [None] * count
    usage = Usage(len(call.prompt), 0)
    async for deltas in generation.deltas():
        for delta in deltas:
            usage.completion_tokens += delta.generated
            texts[delta.choice].append(delta.text)
            shown[delta.choice].extend(delta.shown)
            finishes[delta.choice] = delta.finish or finishes[delta.choice]
    usage.cached_tokens = generation.cached_tokens(count)
    return {
        **call.header("chat.completion"),
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(text), "refusal": None},
                "logprobs": call.logprobs(shown[index]),
                "finish_reason": finish.value if finish else None,
            }
            for index, (text, finish) in enumerate(zip(texts, finishes, strict=True))
        ],
        "usage": usage.json(),
    }


def _events(call: _Call, generation: Generation) -> WriteEvents:
    options, count = call.body.stream_options, call.body.n or 1
    header = call.header("chat.completion.chunk")
    first = {**header, "usage": None} if options is not None and options.include_usage else header

    def chunks_with(fields: Json) -> Chunks:
        return Chunks({**header, **fields})

    return partial(
        write_chunks,
        generation=generation,
        usage=Usage(len(call.prompt), 0),
        drafts=count,
        options=options,
        chunks_with=chunks_with,
        event_of=partial(_event, call),
        first=[json_event({**first, "choices": [_speaker(index)]}) for index in range(count)],
    )


def _speaker(index: int) -> dict[str, Any]:
    """Return the first piece of a choice, which says who speaks."""
    delta = {"role": "assistant", "content": "", "refusal": None}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _event(call: _Call, chunks: Chunks, delta: Delta) -> str:
    content = delta.text if delta.text or delta.shown else None
    logprobs = call.logprobs(delta.shown) if delta.shown else None
    return chunks.of_content(delta.choice, content, logprobs, delta.finish)
