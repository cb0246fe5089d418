"""POST /v1/completions over plain HTTP: its shapes and its edge cases."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.api.calls import FULL, PROMPT, complete, error_of, events, stream, tokens_of
from tests.live import LiveServer

EMOJI_PROMPT = "🎉🥳🎉🥳🎉🥳🎉🥳🎉🥳"


def text_of(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["text"]  # type: ignore[no-any-return]


def refused(http: httpx.Client, **body: Any) -> dict[str, Any]:
    return error_of(http.post("/v1/completions", json={"prompt": PROMPT, **body}), 400)


# The four forms of a prompt, and none.


def test_a_text_and_its_tokens_are_the_same_prompt(http: httpx.Client) -> None:
    tokens = tokens_of(http, PROMPT)
    answers = [
        complete(http, FULL, prompt=prompt, max_tokens=4)
        for prompt in (PROMPT, [PROMPT], tokens, [tokens])
    ]
    assert len({text_of(answer) for answer in answers}) == 1
    assert all(answer["usage"]["prompt_tokens"] == len(tokens) for answer in answers)
    assert all(answer["usage"]["total_tokens"] == len(tokens) + 4 for answer in answers)


@pytest.mark.parametrize("prompt", [None, ""])
def test_no_prompt_begins_a_text(http: httpx.Client, prompt: str | None) -> None:
    answer = complete(http, prompt=prompt, max_tokens=2, echo=True, logprobs=0)
    logprobs = answer["choices"][0]["logprobs"]
    assert answer["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "total_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert len(logprobs["tokens"]) == 3
    assert logprobs["text_offset"][:2] == [0, 0]


def test_a_missing_prompt_is_the_empty_one(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"max_tokens": 1, "temperature": 0})
    assert text_of(response.json()) == text_of(complete(http, prompt="", max_tokens=1))


def test_choices_of_a_batch_come_in_the_order_of_its_prompts(http: httpx.Client) -> None:
    prompts = ["One two three four", "Red green", "Monday Tuesday Wednesday"]
    batch = complete(http, FULL, prompt=prompts, n=2, max_tokens=3, echo=True)
    assert [choice["index"] for choice in batch["choices"]] == list(range(6))
    for index, choice in enumerate(batch["choices"]):
        assert choice["text"].startswith(prompts[index // 2])
    alone = complete(http, FULL, prompt=prompts[2], max_tokens=3, echo=True)
    assert batch["choices"][4]["text"] == batch["choices"][5]["text"] == text_of(alone)


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [[]],
        [[1], []],
        [-1],
        [10**30],
        [10**6],
        [1.5],
        [True],
        ["a", 1],
        [1, "a"],
        {},
        5,
        [None],
    ],
)
def test_other_prompts_are_refused(http: httpx.Client, prompt: Any) -> None:
    assert refused(http, prompt=prompt)["param"] == "prompt"


def test_a_batch_has_a_largest_size(http: httpx.Client) -> None:
    assert "1025 choices" in refused(http, prompt=["a"] * 1025)["message"]
    assert "1040 choices" in refused(http, prompt=["a"] * 130, n=8)["message"]


# Echo and log probabilities, as lm-evaluation-harness reads them.


@pytest.mark.parametrize("ending", [False, True], ids=["goes on", "ends at once"])
def test_echo_with_logprobs_has_an_entry_for_every_token(
    http: httpx.Client, end_token: int, ending: bool
) -> None:
    tokens = tokens_of(http, PROMPT)
    bias = {end_token: 100} if ending else {end_token: -100}
    answer = complete(
        http, FULL, prompt=[tokens], max_tokens=1, echo=True, logprobs=1, logit_bias=bias
    )
    choice = answer["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["finish_reason"] == ("stop" if ending else "length")
    assert {len(values) for values in logprobs.values()} == {len(tokens) + 1}
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    assert choice["text"].startswith(PROMPT)
    assert (choice["text"] == PROMPT) == ending
    assert_offsets_index_the_text(choice)


def assert_offsets_index_the_text(choice: dict[str, Any]) -> None:
    offsets = choice["logprobs"]["text_offset"]
    assert offsets[0] == 0
    for token, offset in zip(choice["logprobs"]["tokens"], offsets, strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert choice["text"][offset:].startswith(token)


@pytest.mark.parametrize("text", ["A 🥳 costs 5 €.", "<|im_start|>user\nHi<|im_end|>", "Ünïcödé"])
def test_offsets_index_any_text(http: httpx.Client, text: str) -> None:
    for prompt in (text, tokens_of(http, text)):
        answer = complete(http, prompt=prompt, max_tokens=3, echo=True, logprobs=0)
        assert_offsets_index_the_text(answer["choices"][0])


def test_echo_alone_returns_the_prompt_before_the_text(http: httpx.Client) -> None:
    plain = text_of(complete(http, max_tokens=3))
    answer = complete(http, max_tokens=3, echo=True)
    assert text_of(answer) == PROMPT + plain
    assert answer["choices"][0]["logprobs"] is None


def test_max_tokens_0_scores_the_prompt(http: httpx.Client) -> None:
    answer = complete(http, FULL, max_tokens=0, echo=True, logprobs=2)
    longer = complete(http, FULL, max_tokens=1, echo=True, logprobs=2)
    choice = answer["choices"][0]
    assert choice["text"] == PROMPT
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    values = choice["logprobs"]["token_logprobs"][1:]
    expected = longer["choices"][0]["logprobs"]["token_logprobs"][1:-1]
    assert values == pytest.approx(expected, abs=1e-4)
    assert text_of(complete(http, max_tokens=0)) == ""


def test_an_echo_is_streamed_in_one_event(http: httpx.Client) -> None:
    first, *rest = stream(
        http, (FULL and None) or "/v1/completions", echo=True, logprobs=1, max_tokens=2
    )
    assert first["choices"][0]["text"] == PROMPT
    assert len(first["choices"][0]["logprobs"]["tokens"]) == len(tokens_of(http, PROMPT))
    assert [len(event["choices"][0]["logprobs"]["tokens"]) for event in rest] == [1, 1]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_top_logprobs_hold_the_chosen_token_with_the_identical_number(
    http: httpx.Client, count: int
) -> None:
    answer = complete(
        http, prompt="Zebra quartz", temperature=2, seed=3, max_tokens=8, echo=True, logprobs=count
    )
    logprobs = answer["choices"][0]["logprobs"]
    entries = zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    )
    for token, logprob, top in list(entries)[1:]:
        assert top[token] == logprob
        assert max(1, count) <= len(top) <= count + 1
        assert max(top.values()) >= logprob


# When a text ends.


def test_a_stop_string_over_several_tokens_is_cut_off(http: httpx.Client) -> None:
    whole = complete(http, FULL, max_tokens=12, logprobs=0)["choices"][0]
    stop = whole["text"][6:13]
    assert not any(stop in token for token in whole["logprobs"]["tokens"])
    expected = whole["text"][: whole["text"].index(stop)]
    choice = complete(http, FULL, max_tokens=12, stop=[stop, "\x00"])["choices"][0]
    assert choice["text"] == expected
    assert choice["finish_reason"] == "stop"
    streamed = stream(http, headers=FULL, max_tokens=12, stop=stop)
    assert "".join(event["choices"][0]["text"] for event in streamed) == expected
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop"


def test_text_held_back_for_a_stop_string_comes_at_the_end(http: httpx.Client) -> None:
    whole = text_of(complete(http, max_tokens=6))
    assert text_of(complete(http, max_tokens=6, stop=whole[-2:] + "\x00")) == whole


def test_a_stop_token_is_not_shown(http: httpx.Client) -> None:
    whole = complete(http, FULL, max_tokens=4, logprobs=0)["choices"][0]
    tokens = whole["logprobs"]["tokens"]
    (second,) = tokens_of(http, tokens[1])
    answer = complete(http, FULL, max_tokens=4, stop_token_ids=[second], logprobs=0)
    choice = answer["choices"][0]
    assert choice["text"] == tokens[0]
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"]["tokens"] == tokens[:2]
    assert answer["usage"]["completion_tokens"] == 2


def test_min_tokens_and_ignore_eos_go_past_the_end(http: httpx.Client, end_token: int) -> None:
    bias = {end_token: 100}
    at_once = complete(http, max_tokens=4, logit_bias=bias)
    later = complete(http, max_tokens=4, logit_bias=bias, min_tokens=2)
    never = complete(http, max_tokens=4, logit_bias=bias, ignore_eos=True)
    assert [a["usage"]["completion_tokens"] for a in (at_once, later, never)] == [1, 3, 4]
    reasons = [a["choices"][0]["finish_reason"] for a in (at_once, later, never)]
    assert reasons == ["stop", "stop", "length"]
    assert text_of(at_once) == text_of(never) == ""


def test_logit_bias_chooses_and_bans(http: httpx.Client) -> None:
    (cheese,) = tokens_of(http, " cheese")
    forced = complete(http, max_tokens=3, logit_bias={str(cheese): 100})
    assert text_of(forced) == " cheese cheese cheese"
    banned = complete(http, max_tokens=1, logit_bias={tokens_of(http, " Paris")[0]: -100})
    assert text_of(banned) != " Paris"


# Several choices.


def mean_logprob(choice: dict[str, Any]) -> float:
    values: list[float] = choice["logprobs"]["token_logprobs"]
    return sum(values) / len(values)


def test_best_of_returns_the_best_of_what_n_returns(http: httpx.Client) -> None:
    asked: dict[str, Any] = {"temperature": 1.2, "seed": 11, "max_tokens": 5, "logprobs": 0}
    drafts = complete(http, n=4, **asked)["choices"]
    answer = complete(http, n=2, best_of=4, **asked)
    assert len({draft["text"] for draft in drafts}) > 1
    ranked = sorted(drafts, key=mean_logprob, reverse=True)
    assert [choice["text"] for choice in answer["choices"]] == [d["text"] for d in ranked[:2]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == sum(
        len(draft["logprobs"]["tokens"]) for draft in drafts
    )
    quiet = complete(http, n=1, best_of=4, **{**asked, "logprobs": None})["choices"][0]
    assert (quiet["text"], quiet["logprobs"]) == (ranked[0]["text"], None)


# Streams.


def test_a_stream_is_one_event_a_token(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 5, "temperature": 0, "ignore_eos": True, "stream": True}
    response = http.post("/v1/completions", json=body, headers=FULL)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-model-variant"] == "full"
    found = events(response.content)
    assert len(found) == 5
    assert len({(event["id"], event["created"], event["object"]) for event in found}) == 1
    assert found[0]["object"] == "text_completion"
    assert all("usage" not in event for event in found)
    assert [e["choices"][0]["finish_reason"] for e in found] == [None] * 4 + ["length"]
    text = "".join(event["choices"][0]["text"] for event in found)
    assert text == text_of(complete(http, FULL, max_tokens=5, ignore_eos=True))


def test_usage_comes_last_or_with_every_event(http: httpx.Client) -> None:
    *tokens, last = stream(http, max_tokens=3, stream_options={"include_usage": True})
    assert [event["usage"] for event in tokens] == [None] * 3
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    both = {"include_usage": True, "continuous_usage_stats": True}
    found = stream(http, max_tokens=3, stream_options=both)
    assert [event["usage"]["completion_tokens"] for event in found] == [1, 2, 3, 3]


def test_cached_tokens_of_a_prompt_that_came_before(http: httpx.Client, live: LiveServer) -> None:
    asked = {"prompt": list(range(400, 520)), "max_tokens": 2, "ignore_eos": True}
    hits = "attndrop_prefix_cache_hit_tokens_total"
    before = live.metric(hits, variant="pruned")
    first, second = (complete(http, **asked) for _ in range(2))
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 90 <= cached < 120
    assert text_of(second) == text_of(first)
    *_, last = stream(http, **asked, n=2, stream_options={"include_usage": True})
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": cached}
    assert live.metric(hits, variant="pruned") == before + 3 * cached
    other = complete(http, FULL, **asked)
    assert other["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_a_stream_of_several_choices_says_which_is_which(http: httpx.Client) -> None:
    asked: dict[str, Any] = {
        "prompt": ["A", "B"],
        "n": 2,
        "temperature": 1,
        "seed": 5,
        "max_tokens": 3,
    }
    texts = [""] * 4
    for event in stream(http, **asked):
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in complete(http, **asked)["choices"]]


def test_characters_split_over_tokens_come_out_whole(http: httpx.Client) -> None:
    asked: dict[str, Any] = {"prompt": EMOJI_PROMPT, "max_tokens": 14, "ignore_eos": True}
    found = stream(http, headers=FULL, **asked)
    pieces = [event["choices"][0]["text"] for event in found]
    assert len(pieces) == 14
    assert "" in pieces[:-1]
    assert any(ord(character) > 0xFFFF for character in "".join(pieces))
    assert "\ufffd" not in "".join(pieces[:-1])
    assert "".join(pieces) == text_of(complete(http, FULL, **asked))


# Fields.


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            {"logprobs": None, "repetition_penalty": 1.0, "temperature": 0.0, "stream": True,
             "stream_options": {"include_usage": True}},
            id="vllm bench serve",
        ),
        pytest.param(
            {"stop": None, "ignore_eos": True, "stream": True,
             "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
            id="guidellm",
        ),
        pytest.param({"min_tokens": 2, "ignore_eos": True, "stream": True}, id="aiperf"),
        pytest.param(
            {"suffix": None, "best_of": None, "user": None, "logit_bias": None, "seed": None,
             "stop": [], "stream": None, "stream_options": None, "n": None, "echo": None,
             "top_p": None, "presence_penalty": None, "frequency_penalty": None,
             "prompt_logprobs": None, "return_token_ids": False, "top_k": -1, "min_p": None},
            id="null means the default",
        ),
    ],
)  # fmt: skip
def test_what_clients_send_is_understood(http: httpx.Client, body: dict[str, Any]) -> None:
    response = http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2, **body})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}},
         "stream_options.include_obfuscation"),
        ({"guided_json": {}}, "guided_json"),
        ({"list[str]": 1}, "list[str]"),
        ({"body": 1}, "body"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ],
)  # fmt: skip
def test_fields_without_effect_here_are_refused_by_name(
    http: httpx.Client, body: dict[str, Any], param: str
) -> None:
    error = refused(http, **body)
    assert error["param"] == param
    assert param.rsplit(".")[-1] in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 10**30}, "top_k"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True, "max_tokens": []}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"49152": 1}}, "logit_bias"),
        ({"stop_token_ids": [49152]}, "stop_token_ids"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_values_out_of_range_are_refused(
    http: httpx.Client, body: dict[str, Any], param: str
) -> None:
    assert refused(http, **body)["param"] == param


def test_a_text_too_long_is_refused_with_its_own_code(http: httpx.Client) -> None:
    assert refused(http, max_tokens=10**6)["code"] == "context_length_exceeded"
    assert refused(http, prompt="a b " * 9000)["code"] == "context_length_exceeded"
