"""The quality benchmark on a tiny model: it makes plans, judges them, and rewrites its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.quality import (
    CALIBRATION,
    CONVERSATION,
    INSTRUCTIONS,
    QUESTIONS,
    TEXT,
    judging_text,
    main,
)
from benchmarks.quality_page import BEGIN, END
from pruning.evidence import read_evidence
from pruning.plan import read_with_substitutes
from tests.pruning.tiny_models import tiny_base, tiny_model

SENTENCE = "All work and no play makes Jack a dull boy.\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A tiny model, and a folder of data as the benchmark wants it."""
    folder = tmp_path_factory.mktemp("data")
    tiny_model(layers=6).save_pretrained(folder / "tiny")
    tiny_base().tokenizer.save_pretrained(folder / "tiny")
    config = json.loads((folder / "tiny" / "config.json").read_text())
    (folder / "tiny" / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": 512})
    )
    for name in ("calibration", "eval", "chat"):
        (folder / name).mkdir()
    chat = json.dumps({"messages": [{"role": "user", "content": SENTENCE * 10}]}) + "\n"
    for name in (*CALIBRATION, TEXT):
        (folder / name).write_text(chat if name.endswith("jsonl") else SENTENCE * 50)
    (folder / CONVERSATION).write_text('{"turns": ["who?"]}\n{"turns": ["why?"]}\n')
    instructed = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    (folder / INSTRUCTIONS).write_text(json.dumps({"prompt": "Say it.", **instructed}) + "\n")
    question = {"prompt": "it is", "choices": ["odd", "even"], "gold": 1}
    for name in QUESTIONS:
        (folder / "eval" / f"{name}.jsonl").write_text((json.dumps(question) + "\n") * 3)
    return folder


def run(data: Path, *options: object) -> str:
    app = typer.Typer()
    app.command()(main)
    common = ["--data", data, "--model", data / "tiny", "--quick", "--results", data / "results"]
    result = CliRunner().invoke(app, [str(option) for option in (*common, *options)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_pages_figures_are_replaced_and_the_rest_stays(data):
    page = data / "page.md"
    page.write_text(f"# Mine\n{BEGIN}\nstale\n{END}\nmore\n")
    run(data, "--drop", "2,4", "--out", page)
    text = page.read_text()
    assert text.startswith(
        f"# Mine\n{BEGIN}\n\n`python -m benchmarks.quality --data FOLDER --quick`"
    )
    assert text.endswith(f"{END}\nmore\n")
    assert "stale" not in text
    assert "| dropped of 6 | cosine | greedy | greedy + linear |" in text
    found = read_evidence(data / "results" / "greedy---linear.evidence.json")
    plan, substitutes = read_with_substitutes(data / "results" / "greedy---linear.plan.json")
    assert found.plan == plan.id
    parameters, _ = substitutes.size(plan.dropped_layers(4))
    assert f"| {parameters:,} / " in text
    row = next(row for row in found.figures if (row.domain, row.dropped) == ("text", 4))
    assert f" {row.perplexity:.1f} / {row.kl:.2f} / {row.agreement:.3f} / " in text


def test_text_is_cut_at_a_heading_and_nothing_is_lost(tmp_path):
    lines = [
        " = One = \n",
        *["text \n"] * 4,
        " = = Part = = \n",
        "text \n",
        " = Two = \n",
        "end \n",
    ]
    (tmp_path / "whole.txt").write_text("".join(lines))
    judge = judging_text(tmp_path / "whole.txt", tmp_path)
    assert judge.read_text() == " = Two = \nend \n"
    assert (tmp_path / "wikitext_fit.txt").read_text() + judge.read_text() == "".join(lines)


def test_what_was_measured_before_is_not_measured_again(data):
    run(data, "--drop", "3")
    evidence = data / "results" / "greedy.evidence.json"
    before = evidence.read_bytes()
    run(data, "--drop", "3")
    assert evidence.read_bytes() == before
    run(data, "--drop", "1")
    assert evidence.read_bytes() != before


def test_given_plans_are_judged_beside_the_bars(data):
    run(data, "--drop", "4")
    given = data / "results" / "cosine.plan.json"
    text = run(data, "--drop", "4", "--given-only", "--plan", given)
    held = next(line for line in text.splitlines() if line.startswith("| 4 | cosine.plan |"))
    assert "(≤ 1.03)" in held
    assert "(≥ 0.9)" in held
    assert "made elsewhere" in text
    assert "256 tokens |" in text
