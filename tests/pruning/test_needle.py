"""Needles: where the sentence stands, and that nothing else tells the answer."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from pruning.evidence import EvidenceError, read_evidence
from pruning.likelihood import Likelihood
from pruning.needle import hidden, retrieval
from tests.pruning.test_evaluate import folder, run  # noqa: F401 - a fixture
from tests.pruning.tiny_models import BOS, ids, tiny_base

FILLER = torch.tensor([ids("x" * 120), ids("y" * 120)])


@pytest.mark.parametrize("depth", [0, 40, 100])
def test_the_sentence_stands_where_it_should(depth):
    tokenizer = tiny_base().tokenizer
    pairs = hidden(tokenizer, FILLER.repeat(1, 2), depth, seed=3)
    for pair, letter in zip(pairs, "xy", strict=True):
        text, answer = (
            tokenizer.decode(part).replace(" ", "") for part in (pair.context, pair.continuation)
        )
        assert len(pair.context) == 240
        assert len(answer) == 5
        assert f"is{answer}." in text
        assert text.count(answer) == 1
        room = text.count(letter)
        assert text.index("Thesecret") == pytest.approx(room * depth // 100, abs=1)


def test_trials_differ_and_depths_and_seeds_say_how():
    tokenizer = tiny_base().tokenizer
    windows = FILLER.repeat(1, 2)
    answers = [[p.continuation for p in hidden(tokenizer, windows, d, 3)] for d in (0, 50)]
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][1]
    assert answers[0] != [p.continuation for p in hidden(tokenizer, windows, 0, 4)]


def test_what_a_tokenizer_puts_before_a_text_stays_there_once():
    tokenizer = tiny_base(adds_bos=True).tokenizer
    (pair,) = hidden(tokenizer, torch.tensor([[BOS, *ids("z" * 219)]]), 0, seed=1)
    assert pair.context[0] == BOS
    assert BOS not in pair.context[1:] + pair.continuation
    assert len(pair.context) == 220


def test_too_short_a_text():
    with pytest.raises(EvidenceError, match="20 tokens are too few to hide a sentence in"):
        hidden(tiny_base().tokenizer, torch.tensor([ids("x" * 20)]), 0, seed=0)


def test_found_is_what_greedy_decoding_would_write():
    trials = [Likelihood((-0.5, -1.5), (0, 0)), Likelihood((-3.0, -1.0), (2, 0))]
    found = retrieval(trials, dropped=4, length=512, depth=25)
    assert (found.found, found.found_error) == (0.5, pytest.approx(0.5))
    assert (found.logprob, found.logprob_error) == (-1.5, pytest.approx(0.5))


def test_the_command_measures_every_place_and_length(folder, tmp_path):  # noqa: F811
    roomy, out = tmp_path / "roomy", tmp_path / "out.json"
    shutil.copytree(folder / "tiny", roomy)
    config = json.loads((roomy / "config.json").read_text())
    (roomy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    options = ("--needle", "250,260", "--needle-depths", "0,100", "--needles", 2, "--json", out)
    sources = ("--model", roomy, "--text", folder / "text.txt", "--windows", 1, "--length", 64)
    result = run(folder, *sources, "--drop", 2, *options)
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["retrieval"]
    places = [(row["length"], row["depth"], row["dropped"]) for row in rows]
    assert places == [(n, at, d) for n in (250, 260) for at in (0, 100) for d in (0, 2)]
    assert all(row["trials"] == 2 for row in rows)
    assert len(read_evidence(out).retrieval) == 8
    assert "sentences found, 2 in each place" in result.stdout


@pytest.mark.parametrize("text", ["x", "0", "512,", "-4"])
def test_lengths_that_are_no_numbers(folder, text):  # noqa: F811
    result = run(folder, "--needle", text)
    assert result.exit_code == 1
    assert "--needle takes numbers of 1 to" in result.stderr
