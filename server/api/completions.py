"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.api.answers import EventStream, Json, WriteEvents, unless_client_leaves
from server.api.chunks import Chunks, write_chunks
from server.api.errors import bad_request
from server.api.front import VARIANT_HEADER
from server.api.generation import ChoiceSpec, Delta, Generation, Shown
from server.api.logprobs import completion_logprobs
from server.api.params import choice_params
from server.api.schema import CompletionRequest
from server.api.service import Service
from server.api.usage import Usage
from server.engine.request import FinishReason

router = APIRouter()

_DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class _Prompt:
    tokens: tuple[int, ...]
    text: str


@dataclass(slots=True)
class _Answer:
    """One choice, collected."""

    text: list[str] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    generated: int = 0
    finish: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.shown.extend(delta.shown)
        self.generated += delta.generated
        self.finish = delta.finish or self.finish

    @property
    def mean_logprob(self) -> float:
        """Log probability per generated token, by which best_of ranks."""
        generated = self.shown[len(self.shown) - self.generated :]
        values = [entry.logprobs.logprob for entry in generated if entry.logprobs]
        return sum(values) / max(1, len(values))


@dataclass(frozen=True, slots=True)
class _Call:
    """A request with everything resolved."""

    service: Service
    body: CompletionRequest
    variant: str
    prompts: tuple[_Prompt, ...]
    id: str
    created: int

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.tokens) for prompt in self.prompts)

    def header(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.body.model or self.service.model_name,
            "system_fingerprint": self.service.system_fingerprint(self.variant),
        }


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    call = _Call(
        service=service,
        body=body,
        variant=service.resolve_variant(body.model, request.headers),
        prompts=await _prompts(service, body),
        id=f"cmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
    )
    generation = Generation(service, call.variant, call.id, _specs(call))
    headers = {VARIANT_HEADER: call.variant}
    if body.stream:
        return EventStream(_events(call, generation), headers)
    answer = await unless_client_leaves(request, _collect(call, generation))
    return JSONResponse(answer, headers=headers)


async def _prompts(service: Service, body: CompletionRequest) -> tuple[_Prompt, ...]:
    texts, tokens = _texts_and_tokens(body)
    choices = (len(texts) + len(tokens)) * body.drafts
    most = service.engine.queue_limit
    if not 0 < choices <= most:
        raise bad_request(
            f"'prompt' asks for {choices} choices, and a request may have 1 to {most}; "
            "send several requests",
            "prompt",
        )
    encoded = await service.tokenize(texts, special=body.add_special_tokens is not False)
    first = (service.first_token,)
    return (
        *(_Prompt(ids or first, text) for ids, text in zip(encoded, texts, strict=True)),
        *(_token_prompt(service, body, ids) for ids in tokens),
    )


def _texts_and_tokens(body: CompletionRequest) -> tuple[Sequence[str], Sequence[Sequence[int]]]:
    """Return the prompts that the four forms of `prompt` (and null) mean; one of both is empty."""
    match body.prompt:
        case None | str():
            return [body.prompt or ""], []
        case [str(), *_]:
            return cast("list[str]", body.prompt), []
        case [int(), *_]:
            return [], [cast("list[int]", body.prompt)]
        case _:
            return [], cast("list[list[int]]", body.prompt)


def _token_prompt(service: Service, body: CompletionRequest, tokens: Sequence[int]) -> _Prompt:
    if not tokens:
        raise bad_request("'prompt' holds an empty list of tokens", "prompt")
    service.check_tokens(tokens, "prompt")
    return _Prompt(tuple(tokens), service.vocabulary.text(tokens) if body.echo else "")


def _specs(call: _Call) -> list[ChoiceSpec]:
    """Return what to generate: for every prompt, as many drafts as n and best_of ask for."""
    body = call.body
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    ranked = body.drafts > (body.n or 1)
    params = choice_params(
        call.service,
        body,
        count=body.drafts,
        max_tokens=max_tokens,
        logprobs=0 if ranked and body.logprobs is None else body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    return [
        ChoiceSpec(prompt.tokens, choice, body.stops, prompt.text if body.echo else None)
        for prompt in call.prompts
        for choice in params
    ]


async def _collect(call: _Call, generation: Generation) -> Json:
    answers = [_Answer() for _ in range(len(call.prompts) * call.body.drafts)]
    async for deltas in generation.deltas():
        for delta in deltas:
            answers[delta.choice].add(delta)
    generated = sum(answer.generated for answer in answers)
    return {
        **call.header(),
        "choices": [
            _choice(call, index, answer) for index, answer in enumerate(_best(call, answers))
        ],
        "usage": Usage(
            call.prompt_tokens, generated, generation.cached_tokens(call.body.drafts)
        ).json(),
    }


def _best(call: _Call, answers: Sequence[_Answer]) -> list[_Answer]:
    """Return the n best drafts of each prompt, prompts in order."""
    wanted, count = call.body.n or 1, call.body.drafts
    if wanted == count:
        return list(answers)
    kept: list[_Answer] = []
    for start in range(0, len(answers), count):
        drafts = sorted(answers[start : start + count], key=lambda a: -a.mean_logprob)
        kept.extend(drafts[:wanted])
    return kept


def _events(call: _Call, generation: Generation) -> WriteEvents:
    def event_of(chunks: Chunks, delta: Delta) -> str:
        logprobs = _logprobs(call, delta.shown)
        return chunks.of_text(delta.choice, delta.text, logprobs, delta.finish)

    return partial(
        write_chunks,
        generation=generation,
        usage=Usage(call.prompt_tokens, 0),
        drafts=call.body.drafts,
        options=call.body.stream_options,
        chunks_with=partial(Chunks, call.header()),
        event_of=event_of,
    )


def _choice(call: _Call, index: int, answer: _Answer) -> dict[str, Any]:
    return {
        "index": index,
        "text": "".join(answer.text),
        "logprobs": _logprobs(call, answer.shown),
        "finish_reason": answer.finish.value if answer.finish else None,
    }


def _logprobs(call: _Call, shown: Sequence[Shown]) -> dict[str, Any] | None:
    if call.body.logprobs is None:
        return None
    return completion_logprobs(call.service.vocabulary, shown)
