"""`attndrop evaluate` on tiny models: its figures against plain transformers, and its answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from pruning.calibration import CalibrationError, calibrate
from pruning.conversation import chat_prompts, greedy, sampled
from pruning.evaluate import repetition
from pruning.evidence import read_evidence
from pruning.plan import read_with_substitutes
from pruning.targets import attention_of
from server.cli import app
from tests.pruning.tiny_models import EOS, ids, tiny_base, tiny_model
from tests.reference.divergence import cost, substituted
from tests.reference.silenced import silenced

LAYERS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, a greedy plan of it with substitutes, a text and a file of prompts."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_model(layers=LAYERS).save_pretrained(folder / "tiny")
    tiny_base().tokenizer.save_pretrained(folder / "tiny")
    (folder / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 20)
    lines = [{"prompt": "hi"}, {"turns": ["who?", "why?"]}, {"messages": chat("yes", "no", "so")}]
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--strategy", "greedy", "--substitutes", "linear", "--length", "32"]
    made = CliRunner().invoke(
        app,
        ["plan", "--model", str(folder / "tiny"), *options, "--output", str(folder / "p.json")],
        env={"ATTNDROP_CACHE_DIR": str(folder / "cache")},
    )
    assert made.exit_code == 0, made.output
    return folder


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": c} for role, c in zip(roles, contents, strict=False)]


def run(folder: Path, *options: object) -> Result:
    arguments = ["evaluate", "--model", folder / "tiny", "--plan", folder / "p.json", *options]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_figures_on_text_are_those_of_plain_transformers(folder, tmp_path):
    out = tmp_path / "out.json"
    small = ("--windows", 5, "--length", 24, "--json", out)
    result = run(folder, "--text", folder / "text.txt", "--drop", 2, "--drop", 4, *small)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    plan, substitutes = read_with_substitutes(folder / "p.json")
    table = calibrate(str(folder / "text.txt"), tiny_base(), samples=5, length=24).token_ids
    plain = tiny_model(layers=LAYERS)
    assert [row["dropped"] for row in found["figures"]] == [0, 2, 4]
    for row in found["figures"]:
        maps = {
            layer: (substitutes.by_layer[layer].weight, substitutes.by_layer[layer].bias)
            for layer in plan.dropped_layers(row["dropped"])
        }
        expected = cost(plain, substituted(plain, maps), table)
        assert row["kl"] == pytest.approx(expected.kl, abs=1e-5)
        assert row["agreement"] == expected.agreement
        assert row["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
        assert row["kl_p50"] <= row["kl_p90"] <= row["kl_p99"]
    assert found["figures"][0]["perplexity_ratio"] == 1
    assert found["domains"][0]["tokens"] == 5 * 23
    assert found["substitutes"] == plan.substitutes.fingerprint
    assert "2 substitutes: 2,112 parameters" in result.stdout


def test_conversation_is_judged_on_the_full_models_answers(folder, tmp_path):
    out = tmp_path / "out.json"
    small = ("--prompts", 2, "--answer", 9, "--seed", 3, "--json", out)
    result = run(folder, "--conversation", folder / "chat.jsonl", "--drop", "50%", *small)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    base = tiny_base(layers=LAYERS)
    prompts = chat_prompts(str(folder / "chat.jsonl"), base, 2)
    answers = sampled(base, prompts, 9, [3, 4])
    assert found["domains"][0]["tokens"] == sum(len(each.answer) for each in answers)
    plain = tiny_model(layers=LAYERS)
    loss, count = 0.0, 0
    for each in answers:
        table = torch.cat([each.prompt, each.answer])[None]
        with torch.no_grad():
            logits = plain(table).logits[0, len(each.prompt) - 1 : -1].double().log_softmax(-1)
        loss -= logits.gather(1, each.answer[:, None]).sum().item()
        count += len(each.answer)
    assert found["figures"][0]["perplexity"] == pytest.approx(torch.tensor(loss / count).exp())
    assert [row["dropped"] for row in found["health"]] == [0, 3]
    assert found["health"][0]["mean_length"] == count / 2
    assert "answers that each wrote itself" in result.stdout


def test_nothing_to_measure_on_is_one_sentence(folder):
    result = run(folder)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: name something to measure on")


class TestConversations:
    def test_prompts_of_every_form_end_where_the_answer_begins(self, folder):
        base = tiny_base()
        found = chat_prompts(str(folder / "chat.jsonl"), base, 3)
        assert [each.tolist() for each in found] == [
            ids("user: hi\n"),
            ids("user: who?\n"),
            ids("user: yes\nassistant: no\nuser: so\n"),
        ]

    @pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
    def test_answers_are_the_variants_own_draws(self, family):
        """Replaying the draws over whole sequences, one by one, gives the same tokens."""
        base, plain = tiny_base(family), silenced(tiny_model(family), [2])
        prompts = [torch.tensor(ids(text)) for text in ("so: ", "who is it?", "a")]
        for seed, written in enumerate(sampled(base, prompts, 12, [0, 1, 2], attention_of([2]))):
            generator, sequence = torch.Generator().manual_seed(seed), prompts[seed]
            for token in written.answer:
                with torch.no_grad():
                    logits = plain(sequence[None]).logits[0, -1]
                sums = torch.softmax(logits, -1).double().cumsum(-1)
                point = torch.rand(1, generator=generator, dtype=torch.float64) * sums[-1]
                assert int((sums <= point).sum()) == int(token)
                sequence = torch.cat([sequence, token[None]])
            assert written.finished == (int(written.answer[-1]) == EOS)
            assert written.finished or len(written.answer) == 12

    def test_greedy_answers_are_the_most_likely_tokens(self):
        base, plain = tiny_base(), silenced(tiny_model(), [1])
        prompts = [torch.tensor(ids(text)) for text in ("so: ", "who is it?")]
        for prompt, written in zip(
            prompts, greedy(base, prompts, 8, attention_of([1])), strict=True
        ):
            sequence = prompt
            for token in written.answer:
                with torch.no_grad():
                    assert int(plain(sequence[None]).logits[0, -1].argmax()) == int(token)
                sequence = torch.cat([sequence, token[None]])

    def test_an_answer_ends_with_the_end_token(self):
        base = tiny_base()
        base.model.lm_head.weight.data.zero_()
        base.model.lm_head.weight.data[EOS] = 100.0
        base.model.model.norm.weight.data.fill_(1.0)
        written = sampled(base, [torch.tensor(ids("abc"))] * 4, 5, range(4))
        for each in written:
            assert EOS not in each.answer[:-1].tolist()
            assert each.finished == (each.answer[-1] == EOS)

    @pytest.mark.parametrize(
        "line", [{"text": "x"}, {"messages": chat()}, {"turns": []}, {"messages": ["x"]}, [1]]
    )
    def test_lines_without_a_prompt(self, tmp_path, line):
        path = tmp_path / "chat.jsonl"
        path.write_text(json.dumps(line) + "\n")
        with pytest.raises(CalibrationError, match="line 1: it needs 'messages'"):
            chat_prompts(str(path), tiny_base(), 1)

    def test_too_few_prompts(self, folder):
        with pytest.raises(CalibrationError, match="holds 3 prompts, fewer than the 4 asked"):
            chat_prompts(str(folder / "chat.jsonl"), tiny_base(), 4)


@pytest.mark.parametrize(
    ("tokens", "share"), [([], 0), ([1, 2, 3], 0), ([1, 2, 3, 4, 5], 0), ([7] * 7, 0.75)]
)
def test_repetition_is_the_share_of_runs_that_came_before(tokens, share):
    assert repetition(tokens) == share


def test_multiple_choice_counts_what_is_right_and_what_changed(folder, tmp_path):
    quiz, out = tmp_path / "quiz.jsonl", tmp_path / "out.json"
    lines = [{"prompt": f"n {n} is", "choices": ["odd", "even"], "gold": n % 2} for n in range(12)]
    quiz.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run(folder, "--multiple-choice", quiz, "--drop", 4, "--json", out)
    assert result.exit_code == 0, result.output
    full, pruned = json.loads(out.read_text())["choices"]
    assert (full["dropped"], full["items"], full["unchanged"]) == (0, 12, 1)
    assert full["error"] == pytest.approx((full["accuracy"] * (1 - full["accuracy"]) / 11) ** 0.5)
    assert pruned["dropped"] == 4
    assert "multiple choice, accuracy ± error" in result.stdout
    assert read_evidence(out).choices[0].task == "quiz"
