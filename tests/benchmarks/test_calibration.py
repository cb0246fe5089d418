"""The calibration benchmark: what is called other layers, and what they cost."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.calibration import Scores, chosen, main
from pruning.calibration import calibrate
from pruning.trial import Trial
from tests.pruning.tiny_models import tiny_base, tiny_model


def test_choices_are_compared_with_the_first_set():
    base = tiny_base(layers=4)
    tokens = calibrate("self", base, samples=2, length=16).token_ids
    first = Scores("a", 8, 0, (0.9, 0.1, 0.2, 0.3))
    other = Scores("b", 8, None, (0.9, 0.1, 0.4, 0.3))
    found = chosen([first, other], [1, 2], Trial(base, tokens))
    assert [each.layers for each in found] == [(1,), (1, 2), (1,), (1, 3)]
    assert [each.others for each in found] == [0, 0, 0, 1]
    assert found[0].quality == found[2].quality
    assert found[1].quality != found[3].quality
    assert [each.spread for each in found] == pytest.approx([0, 0, 0.8, 0.8])


def test_every_set_has_a_row(tmp_path):
    tiny_model(layers=6).save_pretrained(tmp_path / "tiny")
    tiny_base().tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 50)
    app = typer.Typer()
    app.command()(main)
    options = ["--judge", tmp_path / "text.txt", "--source", tmp_path / "text.txt"]
    options += ["--model", tmp_path / "tiny", "--samples", "4,2", "--length", "32", "--seeds"]
    options += ["0,1", "--drop", "1,2", "--windows", "2", "--json", tmp_path / "out.json"]
    result = CliRunner().invoke(app, [str(option) for option in options])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == (2 * 2 + 2) * 2
    assert {(row["source"], row["seed"]) for row in rows} == {
        ("self", 0),
        ("self", 1),
        ("text.txt", None),
    }
