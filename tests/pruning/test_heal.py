"""`attndrop heal` on tiny models: what is trained, what is not, going on, and the plan."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from pruning.batches import Batches
from pruning.calibration import silent
from pruning.checkpoint import Checkpoint
from pruning.coordinates import Trainee
from pruning.corpus import Rows, Source
from pruning.distil import Distillation, Distilled, HealError, Training
from pruning.fitting import fit_in_order, input_statistics
from pruning.held_out import HeldOut, mean_kl
from pruning.loading import BaseModel
from pruning.loss import DivergenceGradient
from pruning.plan import read_with_substitutes
from pruning.residuals import Residuals
from pruning.substitutes import LinearSubstitute, SubstituteKind, fit_linear
from pruning.twin import Twin
from server.cli import app
from server.config import Settings
from server.startup import find_plan, make_variants, plan_variants
from tests.engine.tiny_engine import Numbered, recorder, tiny_engine
from tests.pruning.tiny_models import ids, tiny_base, tiny_model
from tests.reference.distillation import kl_gradients
from tests.reference.divergence import substituted
from tests.reference.silenced import greedy

LAYERS, LENGTH, DROPPED = 6, 24, (2, 4)
FULL_RANK = SubstituteKind(None)
TRAINING = Training(steps=12, seconds=None, learning_rate=0.1, batch=4, judge_every=4, seed=3)


def rows(count: int, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(4, 70, (count, LENGTH), generator=generator)
    starts = torch.tensor([1, 5] * (count // 2))
    ends = torch.tensor([LENGTH, LENGTH - 6] * (count // 2))
    return Rows(table, starts, ends)


def source(seed: int = 1) -> Source:
    return Source("text", "text sha256:00", rows(16, seed), rows(6, seed + 1))


def random_maps(base: BaseModel, scale: float = 0.1) -> dict[int, LinearSubstitute]:
    generator = torch.Generator().manual_seed(9)

    def randn(*shape: int) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    return {layer: LinearSubstitute(randn(32, 32), randn(32)) for layer in DROPPED}


def trainees(
    base: BaseModel, source: Source, start: dict[int, LinearSubstitute]
) -> dict[int, Trainee]:
    inputs = input_statistics(base, [source.training], start)
    return {layer: Trainee(each, inputs[layer]) for layer, each in start.items()}


class Trained:
    """One training of a tiny model, broken off where its progress is told to raise."""

    def __init__(
        self,
        path: Path,
        training: Training = TRAINING,
        break_at: int | None = None,
        start: dict[int, LinearSubstitute] | None = None,
    ) -> None:
        self.base = tiny_base(layers=LAYERS)
        self.twin = Twin(self.base, DROPPED)
        self.source = source()
        self.held_out = HeldOut(self.base, self.twin, [self.source])
        self.start = random_maps(self.base) if start is None else start
        self._break_at = break_at
        self.distillation = Distillation(
            self.base,
            self.twin,
            trainees(self.base, self.source, self.start),
            Batches([self.source.training], training.batch, training.seed),
            self.held_out,
            training,
            Checkpoint(path),
            self._progress,
        )

    def run(self) -> Distilled:
        return self.distillation.run()

    def _progress(self, what: str, done: int, total: int) -> None:
        if done == self._break_at:
            raise KeyboardInterrupt


class TestGradient:
    @pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
    def test_it_is_that_of_plain_transformers(self, family):
        base = tiny_base(family, layers=LAYERS)
        base.model.double()
        maps = {k: each.copied(base.device, torch.float64) for k, each in random_maps(base).items()}
        for each in maps.values():
            each.requires_grad_(True)
        table, weights = rows(4, 1).token_ids, torch.rand(4, LENGTH - 1)
        twin, divergence = Twin(base, DROPPED), DivergenceGradient(base)
        divergence._rows = 7
        full = twin.full(table)
        pruned = twin.pruned(full, maps)[:, :-1].flatten(0, 1)
        gradient = divergence(full.last[:, :-1].flatten(0, 1), pruned.detach(), weights.flatten())
        pruned.backward(gradient)
        plain = {k: (each.weight.detach(), each.bias.detach()) for k, each in maps.items()}
        gradients = kl_gradients(tiny_model(family, layers=LAYERS), plain, table, weights.double())
        for layer, (weight, bias) in gradients.items():
            torch.testing.assert_close(maps[layer].weight.grad, weight, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(maps[layer].bias.grad, bias, rtol=1e-3, atol=1e-5)


class TestCompiled:
    @pytest.mark.parametrize("family", ["llama", "gemma2"])
    def test_compiled_layers_give_the_same_values_and_gradients(self, family, monkeypatch):
        compile_ = torch.compile  # traced and differentiated as on a GPU; run by torch's operators
        monkeypatch.setattr(torch, "compile", partial(compile_, backend="aot_eager"))
        base, table = tiny_base(family, layers=LAYERS), rows(4, 1).token_ids
        found = []
        for compiled in (False, True):
            maps = random_maps(base)
            for each in maps.values():
                each.requires_grad_(True)
            twin = Twin(base, DROPPED, compiled=compiled)
            full = twin.full(table)
            pruned = twin.pruned(full, maps)
            pruned.square().sum().backward()
            gradients = [each.weight.grad for each in maps.values()]
            found.append([full.last, full.entering, pruned, *gradients])
        assert "_compute" not in vars(base.model.get_decoder().layers[0])
        for plain, fast in zip(*found, strict=True):
            torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


class TestDistillation:
    def test_the_held_out_divergence_falls(self, tmp_path):
        trained = Trained(tmp_path / "a", replace(TRAINING, steps=60))
        before = mean_kl(trained.held_out.qualities(trained.start))
        result = trained.run()
        assert mean_kl(result.qualities) < 0.8 * before
        judged = trained.held_out.qualities(result.substitutes)
        assert mean_kl(judged) == pytest.approx(mean_kl(result.qualities))

    def test_nothing_but_the_substitutes_changes_or_has_gradients(self, tmp_path):
        trained = Trained(tmp_path / "a")
        before = {name: w.clone() for name, w in trained.base.model.state_dict().items()}
        result = trained.run()
        after = trained.base.model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(w.grad is None for w in trained.base.model.parameters())
        assert not any(w.requires_grad for w in trained.base.model.parameters())
        assert all(each.substitute is None for each in trained.base.sublayers)
        for layer, each in result.substitutes.items():
            assert not torch.equal(each.weight, trained.start[layer].weight)

    @pytest.mark.parametrize("break_at", [6, 11])
    def test_what_was_broken_off_ends_as_if_it_had_not_been(self, tmp_path, break_at):
        whole = Trained(tmp_path / "whole").run()
        with pytest.raises(KeyboardInterrupt):
            Trained(tmp_path / "broken", break_at=break_at).run()
        again = Trained(tmp_path / "broken")
        assert again.distillation._state.step > 0
        resumed = again.run()
        assert (resumed.steps, resumed.tokens) == (whole.steps, whole.tokens)
        for layer, each in whole.substitutes.items():
            assert torch.equal(each.weight, resumed.substitutes[layer].weight)
            assert torch.equal(each.bias, resumed.substitutes[layer].bias)
        assert resumed.qualities == whole.qualities

    def test_a_damaged_checkpoint_starts_over(self, tmp_path):
        (tmp_path / "a").write_bytes(b"no checkpoint")
        assert Trained(tmp_path / "a").run().steps == 12

    def test_the_best_weights_are_kept_not_the_last(self, tmp_path):
        base = tiny_base(layers=LAYERS)
        fitted = fit_in_order(base, [source().held_out], DROPPED, FULL_RANK)
        training = replace(TRAINING, learning_rate=1.0, judge_every=1)
        trained = Trained(tmp_path / "a", training, start=fitted)
        result = trained.run()
        assert result.best_step < result.steps
        assert mean_kl(result.qualities) < trained.distillation._state.latest_kl
        judged = trained.held_out.qualities(result.substitutes)
        assert judged == result.qualities

    def test_no_steps_give_back_what_they_began_with(self, tmp_path):
        trained = Trained(tmp_path / "a", replace(TRAINING, steps=0))
        for layer, each in trained.run().substitutes.items():
            assert torch.equal(each.weight, trained.start[layer].weight)

    def test_too_little_memory_is_one_sentence(self, tmp_path, monkeypatch):
        trained = Trained(tmp_path / "a")

        def full(token_ids: Tensor) -> None:
            raise torch.OutOfMemoryError

        monkeypatch.setattr(trained.twin, "full", full)
        with pytest.raises(HealError, match="steps of 4 sequences; lower --batch or --length"):
            trained.run()

    def test_time_ends_training(self, tmp_path):
        result = Trained(tmp_path / "a", replace(TRAINING, steps=None, seconds=0.5)).run()
        assert result.steps > 0
        assert result.seconds < 5

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seconds": 1.0}, "either --steps or --minutes"),
            ({"steps": -1}, "--steps must be 0"),
            ({"steps": None, "seconds": 0.0}, "--minutes must be above 0"),
            ({"learning_rate": 0.0}, "--learning-rate must be above 0"),
            ({"batch": 0}, "--batch must be"),
            ({"judge_every": 0}, "--judge-every must be"),
        ],
    )
    def test_numbers_that_are_not_usable(self, change, message):
        with pytest.raises(HealError, match=message):
            replace(TRAINING, **change)


class TestFit:
    def test_each_map_is_fitted_with_all_before_it_in_place(self):
        base, table = tiny_base(layers=LAYERS), rows(16, 5).token_ids
        whole = Rows(table, torch.ones(16, dtype=torch.int64), torch.full((16,), LENGTH))
        found = fit_in_order(base, [whole], DROPPED, FULL_RANK)
        residuals = Residuals(base, table)
        for layer in DROPPED:
            expected = fit_linear(residuals.sublayer_pairs(layer), FULL_RANK, torch.float32)
            torch.testing.assert_close(found[layer].weight, expected.weight)
            torch.testing.assert_close(found[layer].bias, expected.bias)
            residuals.drop({layer: expected})

    def test_padding_is_not_fitted(self):
        base, padded = tiny_base(layers=LAYERS), rows(16, 5)
        other = padded.token_ids.clone()
        for row, end in enumerate(padded.ends):
            other[row, end:] = 3
        found = fit_in_order(base, [padded], DROPPED, FULL_RANK)
        same = fit_in_order(base, [replace(padded, token_ids=other)], DROPPED, FULL_RANK)
        for layer in DROPPED:
            torch.testing.assert_close(found[layer].weight, same[layer].weight)


class TestBatches:
    def test_sources_share_a_batch_and_every_row_comes_once_a_round(self):
        few, many = rows(4, 1), rows(12, 2)
        batches = Batches([few, many], size=8, seed=1)
        seen = [batches.at(step).token_ids for step in range(3)]
        lines = [tuple(line) for table in seen for line in table.tolist()]
        assert all(lines.count(tuple(line)) == 3 for line in few.token_ids.tolist())
        assert all(lines.count(tuple(line)) == 1 for line in many.token_ids.tolist())
        batch = batches.at(0)
        assert batch.weights.sum() == pytest.approx(1)
        assert torch.equal(Batches([few, many], 8, 1).at(2).token_ids, seen[2])

    def test_only_what_is_predicted_counts(self):
        batch = Batches([rows(2, 1)], size=2, seed=0).at(0)
        expected = {1: range(LENGTH - 1), 5: range(4, LENGTH - 7)}
        found = sorted(len([w for w in batch.where if w // LENGTH == row]) for row in range(2))
        assert found == sorted(len(each) for each in expected.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, a cosine plan and a greedy one with substitutes, a text and prompts."""
    folder = tmp_path_factory.mktemp("heal")
    tiny_model(layers=LAYERS).save_pretrained(folder / "tiny")
    tiny_base().tokenizer.save_pretrained(folder / "tiny")
    (folder / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 40)
    lines = [{"prompt": "hi " * (1 + index % 3)} for index in range(12)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, options in (
        ("cosine", ()),
        ("greedy", ("--strategy", "greedy", "--substitutes", "linear")),
    ):
        arguments = ("--length", "32", "--drop", "2", "--output", folder / f"{name}.json")
        made = attndrop(folder, "plan", *options, *arguments)
        assert made.exit_code == 0, made.output
    return folder


def attndrop(folder: Path, command: str, *options: object) -> Result:
    arguments = [command, "--model", folder / "tiny", *options]
    return CliRunner().invoke(
        app, [str(each) for each in arguments], env={"ATTNDROP_CACHE_DIR": str(folder / "cache")}
    )


def heal(folder: Path, plan: str, output: Path, *options: object) -> Result:
    small = ("--length", 32, "--batch", 4, "--judge-every", 3, "--written", 256)
    files = ("--plan", folder / f"{plan}.json", "--output", output)
    return attndrop(folder, "heal", *files, *small, *options)


class TestCommand:
    def test_a_plan_without_substitutes_is_fitted_and_healed(self, folder, tmp_path):
        out = tmp_path / "healed.json"
        files = ("--text", folder / "text.txt", "--prompts", folder / "chat.jsonl")
        result = heal(folder, "cosine", out, "--drop", 3, "--steps", 6, *files)
        assert result.exit_code == 0, result.output
        plan, substitutes = read_with_substitutes(out)
        assert substitutes is not None
        assert set(substitutes.by_layer) == plan.dropped_layers() == plan.dropped_layers(3)
        healed = plan.substitutes.healed
        assert [each.source.partition(" ")[0] for each in healed.on] == [
            "self",
            "text.txt",
            "chat.jsonl",
        ]
        assert sum(each.after.kl for each in healed.on) < sum(each.before.kl for each in healed.on)
        assert plan.quality() is not None
        assert [plan.quality(depth) for depth in (1, 2)] == [None, None]
        shown = attndrop_show(out)
        assert "healed" in shown

    def test_a_bounded_rank_stays_bounded(self, folder, tmp_path):
        out = tmp_path / "healed.json"
        result = heal(folder, "cosine", out, "--kind", "linear:4", "--steps", 6)
        assert result.exit_code == 0, result.output
        plan, substitutes = read_with_substitutes(out)
        assert plan.substitutes.kind == "linear:4"
        assert {tuple(each.down.shape) for each in substitutes.by_layer.values()} == {(4, 32)}
        (on,) = plan.substitutes.healed.on
        assert on.after.kl < on.before.kl

    def test_a_healed_plan_is_healed_again_deeper(self, folder, tmp_path):
        out = tmp_path / "healed.json"
        assert heal(folder, "cosine", out, "--steps", 0).exit_code == 0
        (folder / "again.json").write_bytes(out.read_bytes())
        (folder / "again.safetensors").write_bytes(out.with_suffix(".safetensors").read_bytes())
        refused = heal(folder, "again", out, "--drop", 3, "--steps", 3)
        assert "give --refit to fit new ones" in " ".join(refused.stderr.split())
        result = heal(folder, "again", out, "--drop", 3, "--steps", 3, "--refit")
        assert result.exit_code == 0, result.output
        plan, substitutes = read_with_substitutes(out)
        assert len(substitutes.by_layer) == 3
        assert plan.substitutes.healed.drop == 3

    def test_nothing_is_left_behind_but_what_can_be_used_again(self, folder, tmp_path):
        """The same fit and text serve another training."""
        first = heal(folder, "cosine", tmp_path / "a.json", "--steps", 3)
        kept = sorted((folder / "cache" / "heal").iterdir())
        again = heal(folder, "cosine", tmp_path / "b.json", "--steps", 6)
        assert (first.exit_code, again.exit_code) == (0, 0)
        assert sorted((folder / "cache" / "heal").iterdir()) == kept
        assert {path.suffix for path in kept} == {".rows", ".safetensors"}
        assert "fitting substitutes" not in again.stderr

    def test_what_was_trained_on_does_not_judge_the_plan(self, folder, tmp_path):
        plan = ("--calibration", folder / "text.txt", "--length", "32", "--drop", "2")
        made = attndrop(folder, "plan", *plan, "--output", folder / "text.json")
        assert made.exit_code == 0, made.output
        out = tmp_path / "healed.json"
        result = heal(folder, "text", out, "--steps", 0, "--text", folder / "text.txt")
        assert result.exit_code == 0, result.output
        assert "which was trained on now" in " ".join(result.stderr.split())
        plan, _ = read_with_substitutes(out)
        assert plan.quality() is None
        other = heal(folder, "text", out, "--steps", 0)
        assert other.exit_code == 0, other.output
        assert read_with_substitutes(out)[0].quality() is not None

    @pytest.mark.parametrize(
        ("plan", "options", "message"),
        [
            ("cosine", ("--drop", 6), "cannot drop 6 of 6 layers"),
            ("cosine", ("--drop", 0), "cannot heal 0 dropped layers"),
            ("cosine", ("--kind", "none"), "--kind none leaves nothing to heal"),
            ("cosine", ("--kind", "square"), "substitutes must be 'none', 'linear'"),
            ("greedy", ("--kind", "linear:2"), "give --refit to fit linear:2 instead"),
            ("cosine", ("--written", 0), "name something to train on"),
            ("cosine", ("--written", 40), "--written 40 is less than two sequences of 32"),
            ("cosine", ("--text", "no.txt"), "there is no calibration file 'no.txt'"),
            ("cosine", ("--length", 1000), "--length must be 4 to 128"),
            ("cosine", ("--minutes", 1, "--steps", 1), "either --steps or --minutes"),
            ("cosine", ("--dtype", "bfloat16", "--steps", 1), "with a model in float32"),
            ("cosine", ("--measure", 4), "which will have no substitutes; measure at most"),
            ("none", (), "there is no plan file"),
        ],
    )
    def test_mistakes_are_one_sentence(self, folder, tmp_path, plan, options, message):
        result = heal(folder, plan, tmp_path / "healed.json", *options)
        assert (result.exit_code, result.stdout) == (1, "")
        assert message in " ".join(result.stderr.split())
        assert not (tmp_path / "healed.json").exists()

    def test_substitutes_beyond_the_depth_stay(self, folder, tmp_path):
        out = tmp_path / "healed.json"
        options = ("--drop", 2, "--steps", 3, "--measure", 1, "--measure", 4)
        result = heal(folder, "greedy", out, *options)
        assert result.exit_code == 0, result.output
        plan, substitutes = read_with_substitutes(out)
        before, old = read_with_substitutes(folder / "greedy.json")
        assert substitutes is not None
        assert old is not None
        for layer, each in substitutes.by_layer.items():
            same = torch.equal(each.weight, old.by_layer[layer].weight)
            assert same == (layer not in plan.dropped_layers(2))
        measured = [plan.quality(depth) is not None for depth in range(1, 6)]
        assert measured == [True, True, False, True, False]
        assert plan.id != before.id


def test_a_plan_that_drops_mlps_is_refused(folder, tmp_path):
    made = attndrop(
        folder, "plan", "--target", "mlp", "--drop", "2", "--output", tmp_path / "m.json"
    )
    assert made.exit_code == 0, made.output
    result = attndrop(
        folder, "heal", "--plan", tmp_path / "m.json", "--output", tmp_path / "h.json"
    )
    assert result.exit_code == 1
    assert "is for target 'mlp'; heal a plan made with --target attention" in result.output


def test_a_healed_plan_is_served(folder, tmp_path):
    out = tmp_path / "healed.json"
    result = heal(folder, "cosine", out, "--drop", 2, "--steps", 3)
    assert result.exit_code == 0, result.output
    settings = Settings(plan=str(out))
    base = tiny_base(layers=LAYERS)
    plan, substitutes, _ = find_plan(settings, base, silent)
    variants = make_variants(settings, plan_variants(settings, base, plan, substitutes))
    maps = {
        layer: (each.weight.double(), each.bias.double())
        for layer, each in substitutes.by_layer.items()
    }
    pruned = substituted(tiny_model(layers=LAYERS).double(), maps)
    engine, new = tiny_engine(variants, substitutes=substitutes), Numbered()
    requests = [new.request(ids(text), "pruned") for text in ("All work", "no play makes Jack")]
    engine.submit(requests)
    for request in requests:
        recorder(request).wait()
        assert recorder(request).tokens == greedy(pruned, request.prompt, 8)
    engine.stop()


def attndrop_show(path: Path) -> str:
    return CliRunner().invoke(app, ["plan", "show", str(path)]).output
