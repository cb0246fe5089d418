"""The official openai client against a real server: what its users depend on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import completion_create_params as chat_params
from openai.types.completion_create_params import CompletionCreateParamsBase

from server.api.schema import ChatCompletionRequest, CompletionRequest
from tests.api.calls import FULL, MODEL, PROMPT, wait_until
from tests.live import LiveServer

ALL_VARIANTS = ("full", "light", "pruned")
USER: Any = [{"role": "user", "content": "Name a fruit."}]


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_every_field_of_the_client_is_known() -> None:
    for schema, params in (
        (CompletionRequest, CompletionCreateParamsBase),
        (ChatCompletionRequest, chat_params.CompletionCreateParamsBase),
    ):
        assert set(params.__annotations__) <= {*schema.model_fields, *schema.unsupported}


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_header_and_model_id_choose_the_variant(client: OpenAI, variant: str) -> None:
    texts = []
    for model, headers in (
        (MODEL, {"X-Model-Variant": variant.upper()}),
        (f"{MODEL}:{variant}", {}),
        (f"{MODEL}:{variant}", {"X-Model-Variant": variant}),
    ):
        raw = client.completions.with_raw_response.create(
            model=model, prompt=PROMPT, max_tokens=6, temperature=0, extra_headers=headers
        )
        assert raw.headers["x-model-variant"] == variant
        assert raw.headers["x-request-id"]
        answer = raw.parse()
        assert answer.model == model
        texts.append(answer.choices[0].text)
    assert len(set(texts)) == 1


def test_the_bare_model_is_the_pruned_variant(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=USER, max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-model-variant"] == "pruned"
    assert raw.headers["x-request-id"] == "mine-1"


def test_variants_are_told_apart_by_their_fingerprint(client: OpenAI) -> None:
    found = {
        client.completions.create(
            model=f"{MODEL}:{variant}", prompt=PROMPT, max_tokens=1
        ).system_fingerprint
        for variant in ALL_VARIANTS
    }
    assert len(found) == 3


def test_models_can_be_listed_and_retrieved(client: OpenAI) -> None:
    ids = [model.id for model in client.models.list()]
    assert ids == [MODEL, *(f"{MODEL}:{variant}" for variant in ALL_VARIANTS)]
    dropped = []
    for name in ids:
        model = client.models.retrieve(name)
        assert model.id == name
        assert model.object == "model"
        dropped.append(len(model.variant["dropped_layers"]))  # type: ignore[attr-defined]
    assert dropped == [15, 0, 4, 15]


def test_completions_stream_what_they_return(client: OpenAI) -> None:
    def create(**options: Any) -> Any:
        return client.completions.create(
            model=f"{MODEL}:full", prompt=PROMPT, max_tokens=8, temperature=0, **options
        )

    whole = create()
    pieces = list(create(stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert len({(piece.id, piece.created) for piece in pieces}) == 1


def test_chat_streams_what_it_returns(client: OpenAI) -> None:
    def create(**options: Any) -> Any:
        return client.chat.completions.create(
            model=f"{MODEL}:full", messages=USER, max_completion_tokens=8, temperature=0, **options
        )

    whole = create()
    first, *rest = create(stream=True)
    assert first.choices[0].delta.role == "assistant"
    text = "".join(piece.choices[0].delta.content or "" for piece in rest)
    assert text == whole.choices[0].message.content
    assert rest[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_include_usage_adds_one_last_chunk(client: OpenAI) -> None:
    *pieces, last = client.chat.completions.create(
        model=MODEL,
        messages=USER,
        max_tokens=3,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    assert all(piece.usage is None and len(piece.choices) == 1 for piece in pieces)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 3


def test_logprobs_come_in_both_shapes(client: OpenAI) -> None:
    logprobs = (
        client.completions.create(
            model=f"{MODEL}:full", prompt=PROMPT, max_tokens=3, temperature=0, logprobs=2
        )
        .choices[0]
        .logprobs
    )
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert len(logprobs.tokens) == len(logprobs.text_offset or []) == 3
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs or [], logprobs.top_logprobs or [], strict=True
    ):
        assert top[token] == value == max(top.values())
        assert len(top) == 2
    content = (
        client.chat.completions.create(
            model=f"{MODEL}:full",
            messages=USER,
            max_tokens=2,
            temperature=0,
            logprobs=True,
            top_logprobs=3,
        )
        .choices[0]
        .logprobs
    )
    assert content is not None
    for entry in content.content or []:
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert entry.token == entry.top_logprobs[0].token
        assert len(entry.top_logprobs) == 3


def test_n_gives_several_choices(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=4, n=3, temperature=1.5, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    best = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4, best_of=3, seed=1)
    assert len(best.choices) == 1


def test_a_stop_string_is_cut_off(client: OpenAI) -> None:
    whole = client.completions.create(
        model=f"{MODEL}:full", prompt=PROMPT, max_tokens=10, temperature=0
    )
    text = whole.choices[0].text
    cut = client.completions.create(
        model=f"{MODEL}:full", prompt=PROMPT, max_tokens=10, temperature=0, stop=[text[6:12]]
    )
    assert cut.choices[0].text == text[: text.index(text[6:12])]
    assert cut.choices[0].finish_reason == "stop"


def test_logit_bias_is_keyed_by_token_id(client: OpenAI, end_token: int) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=5, logit_bias={str(end_token): 100}
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == ""


# Errors, as the exceptions of the client.


def test_a_bad_parameter_is_a_bad_request(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=PROMPT, temperature=3)
    assert caught.value.param == "temperature"
    assert caught.value.code is None
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


def test_an_unknown_variant_is_a_bad_request(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="full, light, pruned") as caught:
        client.completions.create(
            model=MODEL, prompt=PROMPT, extra_headers={"X-Model-Variant": "fast"}
        )
    assert caught.value.code == "unknown_variant"


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    for model in ("gpt-4", f"{MODEL}:fast"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model=model, prompt=PROMPT)
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(model)


def test_too_long_has_the_code_that_clients_look_for(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=USER, max_tokens=100_000)
    assert caught.value.code == "context_length_exceeded"


# Many at once.


async def streamed(client: AsyncOpenAI, variant: str, seed: int) -> str:
    pieces = await client.completions.create(
        model=f"{MODEL}:{variant}",
        prompt=PROMPT,
        max_tokens=12,
        temperature=1,
        seed=seed,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return "".join([piece.choices[0].text async for piece in pieces])


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(live: LiveServer) -> None:
    wanted = [(variant, seed) for seed in range(3) for variant in ALL_VARIANTS][:8]

    async def run() -> tuple[list[str], list[str]]:
        async with AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            crowd = await asyncio.gather(*(streamed(client, *which) for which in wanted))
            alone = [await streamed(client, *which) for which in wanted[:4]]
        return crowd, alone

    crowd, alone = asyncio.run(run())
    assert crowd[:4] == alone
    assert len(set(crowd)) == 8


def test_a_client_that_stops_reading_is_let_go(client: OpenAI, live: LiveServer) -> None:
    def aborted() -> float:
        name = "attndrop_requests_finished_total"
        return live.metric(name, variant="full", finish_reason="abort")

    before = aborted()
    with client.completions.create(
        model=f"{MODEL}:full",
        prompt=PROMPT,
        max_tokens=2000,
        stream=True,
        extra_body={"ignore_eos": True},
        extra_headers=FULL,
    ) as pieces:
        next(iter(pieces))
    wait_until(lambda: aborted() == before + 1, 3)
    assert client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=2).choices
