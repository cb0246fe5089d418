"""POST /v1/chat/completions over plain HTTP: its shapes and its edge cases."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from pruning.loading import BaseModel
from tests.api.calls import FULL, chat, complete, error_of, stream

PATH = "/v1/chat/completions"
MESSAGES = [
    {"role": "system", "content": "You answer in one word."},
    {"role": "user", "content": "What is the capital of France?"},
]


def refused(http: httpx.Client, **body: Any) -> dict[str, Any]:
    return error_of(http.post(PATH, json={"messages": MESSAGES, **body}), 400)


def content_of(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]  # type: ignore[no-any-return]


def test_an_answer_has_the_shape_of_openai(http: httpx.Client) -> None:
    answer = chat(http, FULL, messages=MESSAGES, max_tokens=4)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["refusal"] is None
    assert choice["logprobs"] is None
    assert answer["usage"]["completion_tokens"] <= 4


def test_messages_go_through_the_chat_template(http: httpx.Client, base: BaseModel) -> None:
    text = base.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    plain = complete(http, FULL, prompt=text, max_tokens=4)
    answer = chat(http, FULL, messages=MESSAGES, max_tokens=4)
    assert content_of(answer) == plain["choices"][0]["text"]
    assert answer["usage"] == plain["usage"]


def test_parts_and_the_developer_role_mean_the_same(http: httpx.Client) -> None:
    question = "What is the capital of France?"
    parts = [{"type": "text", "text": question[:9]}, {"type": "text", "text": question[9:]}]
    other = [
        {"role": "developer", "content": MESSAGES[0]["content"]},
        {"role": "user", "content": parts},
    ]
    answers = [chat(http, messages=messages, max_tokens=4) for messages in (MESSAGES, other)]
    assert content_of(answers[0]) == content_of(answers[1])
    for name in ("prompt_tokens", "completion_tokens"):  # cached tokens differ: one came first
        assert answers[0]["usage"][name] == answers[1]["usage"][name]


def test_both_names_of_the_token_limit_work(http: httpx.Client) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        limit: dict[str, Any] = {name: 3}
        answer = chat(http, **limit, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == 3
        assert answer["choices"][0]["finish_reason"] == "length"
    assert chat(http, max_tokens=2, max_completion_tokens=2)
    assert refused(http, max_tokens=2, max_completion_tokens=3)["param"] == "max_tokens"


def test_without_a_limit_the_answer_ends_by_itself(http: httpx.Client, end_token: int) -> None:
    answer = chat(http, logit_bias={end_token: 100})
    assert content_of(answer) == ""
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 1


def test_a_stream_begins_with_the_role_and_is_one_event_a_token(http: httpx.Client) -> None:
    asked: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 4, "ignore_eos": True}
    first, *rest = stream(http, PATH, FULL, **asked)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert len(rest) == 4
    assert {event["object"] for event in [first, *rest]} == {"chat.completion.chunk"}
    assert len({(event["id"], event["created"]) for event in [first, *rest]}) == 1
    assert all("usage" not in event for event in [first, *rest])
    assert [e["choices"][0]["finish_reason"] for e in rest] == [None] * 3 + ["length"]
    text = "".join(event["choices"][0]["delta"]["content"] for event in rest)
    assert text == content_of(chat(http, FULL, **asked))


def test_usage_comes_last_or_with_every_event(http: httpx.Client) -> None:
    asked: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 2, "ignore_eos": True}
    *others, last = stream(http, PATH, stream_options={"include_usage": True}, **asked)
    assert [event["usage"] for event in others] == [None] * 3
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2
    both = {"include_usage": True, "continuous_usage_stats": True}
    found = stream(http, PATH, stream_options=both, **asked)
    assert [event["usage"]["completion_tokens"] for event in found[1:]] == [1, 2, 2]


def test_streamed_choices_each_begin_with_a_role(http: httpx.Client) -> None:
    asked: dict[str, Any] = {
        "messages": MESSAGES,
        "max_tokens": 2,
        "n": 2,
        "temperature": 1,
        "seed": 3,
    }
    found = stream(http, PATH, **asked)
    assert [event["choices"][0]["index"] for event in found[:2]] == [0, 1]
    texts = ["", ""]
    for event in found:
        texts[event["choices"][0]["index"]] += event["choices"][0]["delta"].get("content", "")
    expected = [choice["message"]["content"] for choice in chat(http, **asked)["choices"]]
    assert texts == expected


@pytest.mark.parametrize("count", [None, 0, 3])
def test_logprobs_hold_an_object_a_token(http: httpx.Client, count: int | None) -> None:
    asked: dict[str, Any] = {
        "messages": MESSAGES,
        "max_tokens": 3,
        "ignore_eos": True,
        "temperature": 2,
        "seed": 1,
    }
    answer = chat(http, FULL, **asked, logprobs=True, top_logprobs=count)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 3
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == (count or 0)
        likely = [top["logprob"] for top in entry["top_logprobs"]]
        assert likely == sorted(likely, reverse=True)
    streamed = stream(http, PATH, FULL, **asked, logprobs=True, top_logprobs=count)[1:]
    flat = [entry for e in streamed for entry in e["choices"][0]["logprobs"]["content"]]
    assert [entry["token"] for entry in flat] == [entry["token"] for entry in content]


def test_a_stop_string_ends_an_answer(http: httpx.Client) -> None:
    whole = content_of(chat(http, FULL, messages=MESSAGES, max_tokens=6, ignore_eos=True))
    answer = chat(http, FULL, messages=MESSAGES, max_tokens=6, ignore_eos=True, stop=whole[2:4])
    assert content_of(answer) == whole[: whole.index(whole[2:4])]
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
             "max_completion_tokens": 2, "stream": True, "temperature": 0.0,
             "repetition_penalty": 1.0, "stream_options": {"include_usage": True}},
            id="vllm bench serve",
        ),
        pytest.param(
            {"max_completion_tokens": 2, "stop": None, "ignore_eos": True, "stream": True,
             "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
            id="guidellm",
        ),
        pytest.param(
            {"max_completion_tokens": 2, "min_tokens": 2, "ignore_eos": True, "stream": True},
            id="aiperf",
        ),
        pytest.param(
            {"max_tokens": 2, "tools": [], "tool_choice": "none", "store": False,
             "response_format": {"type": "text"}, "parallel_tool_calls": True,
             "metadata": {"a": "b"}, "user": "u",
             "service_tier": "auto", "modalities": ["text"], "prompt_cache_key": "k",
             "safety_identifier": "s", "reasoning_effort": None, "functions": None},
            id="fields that ask for nothing",
        ),
    ],
)  # fmt: skip
def test_what_clients_send_is_understood(http: httpx.Client, body: dict[str, Any]) -> None:
    response = http.post(PATH, json={"messages": MESSAGES, **body})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.type",
        ),
        ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages.0.x"),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            "messages.0.tool_calls",
        ),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt": "a"}, "prompt"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    http: httpx.Client, body: dict[str, Any], param: str
) -> None:
    assert refused(http, **body)["param"] == param


def test_a_conversation_too_long_is_refused_with_its_own_code(http: httpx.Client) -> None:
    long = [{"role": "user", "content": "a b " * 9000}]
    assert refused(http, messages=long)["code"] == "context_length_exceeded"
    assert refused(http, max_tokens=10**6)["code"] == "context_length_exceeded"
