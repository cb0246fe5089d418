"""Multiple choice: files of questions, and which choices variants find most probable."""

from __future__ import annotations

import json

import pytest

from pruning.evidence import EvidenceError
from pruning.likelihood import encoded, likelihoods
from pruning.multiple_choice import chosen_by, read_questions
from pruning.targets import attention_of
from tests.pruning.tiny_models import tiny_base

LINES = [
    {"prompt": "the cat", "choices": ["sat", "flew away", "x"], "gold": 0, "id": "a"},
    {"prompts": ["Ann so Ann", "Ann so Bob"], "continuation": "left.", "gold": 1},
    {"prompt": "one", "choices": ["two", "three"], "gold": 1},
]


def written(tmp_path, lines) -> object:
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_choice_with_the_most_log_probability_a_character_is_taken(tmp_path):
    base = tiny_base()
    questions = read_questions(written(tmp_path, LINES), 10)
    assert questions.task == "quiz"
    expected = []
    for item in questions.items:
        pairs = [
            encoded(base.tokenizer, context, " " + text)
            for context, text in zip(item.contexts, item.continuations, strict=True)
        ]
        scores = [
            found.total / len(text)
            for found, text in zip(
                likelihoods(base, pairs, attention_of({2})), item.continuations, strict=True
            )
        ]
        expected.append(scores.index(max(scores)))
    assert chosen_by(base, questions, attention_of({2})) == expected


def test_questions_are_taken_at_an_even_stride(tmp_path):
    lines = [{"prompt": str(n), "choices": ["a", "b"], "gold": 0} for n in range(10)]
    found = read_questions(written(tmp_path, lines), 4)
    assert [item.contexts[0] for item in found.items] == ["0", "2", "5", "7"]


@pytest.mark.parametrize(
    "line",
    [
        [1],
        {"prompt": "a", "choices": ["b"], "gold": 1},
        {"prompt": "a", "choices": ["b"], "gold": -1},
        {"prompt": "a", "choices": [" "], "gold": 0},
        {"prompt": "a", "choices": [3], "gold": 0},
        {"prompt": "a", "choices": "bc", "gold": 0},
        {"prompts": ["a", None], "continuation": "b", "gold": 0},
        {"prompt": "a", "choices": []},
    ],
)
def test_lines_that_are_no_question(tmp_path, line):
    with pytest.raises(EvidenceError, match="line 1: a question needs"):
        read_questions(written(tmp_path, [line]), 1)
