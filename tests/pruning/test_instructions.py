"""Instruction following: IFEval's checks on answers, what is left out, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: attndrop[evaluate]")
pytest.importorskip("langdetect", reason="IFEval's checks need it: attndrop[evaluate]")

from pruning import instructions
from pruning.evidence import EvidenceError, read_evidence
from pruning.instructions import followed, read_instructed
from tests.pruning.test_evaluate import folder, run  # noqa: F401 - a fixture

COMMA, WORDS = "punctuation:no_comma", "length_constraints:number_words"
SENTENCES = "length_constraints:number_sentences"


def line(*kinds: str, **kwargs: object) -> dict[str, object]:
    arguments = [kwargs if kind == WORDS else {} for kind in kinds]
    return {"prompt": "Say it.", "instruction_id_list": list(kinds), "kwargs": arguments}


LINES = [
    line(COMMA),
    line(COMMA, WORDS, relation="at least", num_words=3),
    line(SENTENCES),
    line(COMMA, SENTENCES),
]


def written(path: Path, lines: list) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


@pytest.fixture
def without_punkt(monkeypatch):
    monkeypatch.setattr(instructions.nltk.data, "path", [])


def test_prompts_that_cannot_be_judged_are_left_out_and_counted(tmp_path, without_punkt):
    found = read_instructed(written(tmp_path / "if.jsonl", LINES), 10)
    assert (len(found.prompts), found.left_out) == (2, 2)
    judged = followed(found, ["one, two", "no comma here but words"], dropped=4)
    assert (judged.prompts, judged.left_out, judged.instructions) == (2, 2, 3)
    assert judged.prompt_accuracy == 0.5
    assert judged.instruction_accuracy == pytest.approx(2 / 3)
    assert judged.instruction_error > 0


def test_every_instruction_of_a_prompt_counts(tmp_path):
    found = read_instructed(written(tmp_path / "if.jsonl", LINES[:2]), 10)
    judged = followed(found, ["a b c d", "short"], dropped=0)
    assert judged.prompt_accuracy == 0.5
    assert judged.instruction_accuracy == pytest.approx(2 / 3)
    assert followed(found, ["", ""], dropped=0).instruction_accuracy == 0


def test_nothing_that_can_be_judged(tmp_path, without_punkt):
    with pytest.raises(EvidenceError, match="holds no prompt that can be judged here"):
        read_instructed(written(tmp_path / "if.jsonl", [line(SENTENCES)]), 1)


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {"prompt": "a"},
        line("no:such_kind"),
        {**line(COMMA), "kwargs": []},
        {**line(COMMA), "kwargs": [1]},
        line(),
    ],
)
def test_lines_that_are_no_instruction(tmp_path, broken):
    with pytest.raises(EvidenceError, match="line 1: it needs 'prompt'"):
        read_instructed(written(tmp_path / "if.jsonl", [broken]), 1)


def test_arguments_that_a_check_does_not_take(tmp_path):
    odd = {**line(COMMA), "kwargs": [{"colour": "red"}]}
    found = read_instructed(written(tmp_path / "if.jsonl", [odd]), 1)
    with pytest.raises(EvidenceError, match="cannot be checked"):
        followed(found, ["x"], dropped=0)


def test_the_command_judges_every_depths_answers(folder, tmp_path):  # noqa: F811
    out, path = tmp_path / "out.json", written(tmp_path / "if.jsonl", LINES[:2])
    options = ("--instructed-answer", 6, "--drop", 3, "--json", out)
    result = run(folder, "--ifeval", path, *options)
    assert result.exit_code == 0, result.output
    assert [(row.dropped, row.prompts) for row in read_evidence(out).following] == [(0, 2), (3, 2)]
    assert "instructions" in result.stdout
