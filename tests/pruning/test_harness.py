"""lm-evaluation-harness over variants: its scores are those of our own scorer on the same files."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch

from pruning.evidence import EvidenceError
from pruning.targets import NO_SUBLAYERS, attention_of
from tests.pruning.test_evaluate import folder, run  # noqa: F401 - a fixture
from tests.pruning.tiny_models import ids, tiny_base

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: attndrop[evaluate]")

from lm_eval.api.instance import Instance

from pruning.calibration import silent
from pruning.harness import HarnessModel


def questions(path: Path, count: int, *, shared: str) -> Path:
    """Write random questions with `count` items; shared is what all choices have in common."""
    draw = random.Random(count)
    words = ["cat", "dog", "a bird", "the red house", "I", "nobody", "tree", "went away"]
    lines = []
    for _ in range(count):
        chosen = draw.sample(words, draw.randint(2, 4))
        gold = draw.randrange(len(chosen))
        if shared == "prompt":
            lines.append({"prompt": draw.choice(words), "choices": chosen, "gold": gold})
        else:
            lines.append({"prompts": chosen, "continuation": draw.choice(words), "gold": gold})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(("shared", "metric"), [("prompt", "acc_norm"), ("continuation", "acc")])
def test_the_harness_and_our_scorer_agree_exactly(folder, tmp_path, shared, metric):  # noqa: F811
    path, out = questions(tmp_path / "quiz.jsonl", 40, shared=shared), tmp_path / "out.json"
    both = ("--multiple-choice", path, "--task", path, "--items", 30)
    result = run(folder, *both, "--drop", 2, "--drop", 4, "--json", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    harness = [row for row in found["tasks"] if row["metric"] == metric]
    assert [row["dropped"] for row in harness] == [0, 2, 4]
    for ours, theirs in zip(found["choices"], harness, strict=True):
        assert theirs["items"] == ours["items"] == 30
        assert theirs["value"] == pytest.approx(ours["accuracy"], abs=1e-12)
        assert theirs["error"] == pytest.approx(ours["error"], abs=1e-12)
    assert found["harness"] is not None
    assert "tasks of lm-evaluation-harness" in result.stdout


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


class TestHarnessModel:
    def test_an_empty_context_is_the_token_that_texts_begin_with(self):
        base = tiny_base()
        model = HarnessModel(base, attention_of([1]), silent, "test")
        ((found, _),) = model.loglikelihood(requests("loglikelihood", ("", "ab")))
        with torch.no_grad():
            logits = base.model(torch.tensor([[1, *ids("ab")]]), attending_rows=[3, 0, 3, 3]).logits
        expected = logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids("ab"))[:, None])
        assert found == pytest.approx(expected.sum().item(), abs=1e-5)

    def test_texts_longer_than_the_context_are_read_in_windows(self):
        model = HarnessModel(tiny_base(), NO_SUBLAYERS, silent, "test")
        short, long = "ab" * 20, "abc" * 100
        found = model.loglikelihood_rolling(requests("loglikelihood_rolling", (short,), (long,)))
        ((whole, _),) = model.loglikelihood(requests("loglikelihood", ("", short)))
        assert found[0] == pytest.approx(whole, abs=1e-4)
        assert found[1] < found[0]

    def test_answers_end_before_a_stop_text(self):
        base = tiny_base()
        model = HarnessModel(base, NO_SUBLAYERS, silent, "test")
        (whole,) = model.generate_until(requests("generate_until", ("ab", {"max_gen_toks": 9})))
        stop = whole[4]
        cut = {"max_gen_toks": 9, "until": [stop]}
        (short,) = model.generate_until(requests("generate_until", ("ab", cut)))
        assert short == whole.split(stop)[0]

    def test_drawn_answers_are_refused(self):
        model = HarnessModel(tiny_base(), NO_SUBLAYERS, silent, "test")
        with pytest.raises(EvidenceError, match="only greedy"):
            model.generate_until(requests("generate_until", ("ab", {"do_sample": True})))


def test_without_the_harness_the_sentence_says_what_to_install(folder, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "pruning.harness", None)
    result = run(folder, "--task", "arc_easy")
    assert result.exit_code == 1
    assert "pip install 'attndrop[evaluate]'" in result.stderr
