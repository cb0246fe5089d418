"""The headroom benchmark: every set trains what it says, from one start, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner, Result

from benchmarks.additions import MAPS, SETS, WEIGHTS, student
from benchmarks.headroom import Judged, Outcome, _outcome, main, trials
from pruning.calibration import silent
from pruning.corpus import CorpusRequest
from pruning.distil import HealError, Training
from pruning.heal import Healer, HealRequest
from pruning.held_out import mean_kl
from pruning.plan import Plan, read_with_substitutes
from pruning.sublayers import WrappedLayer
from pruning.twin import Twin
from server.cli import app
from tests.pruning.tiny_models import tiny_base, tiny_model

LAYERS, RANK = 6, 4
TRAINING = Training(steps=40, seconds=None, learning_rate=0.02, batch=8, judge_every=10, seed=3)
OWN_RATE = 0.001


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, a plan that drops two of its layers, and a text."""
    folder = tmp_path_factory.mktemp("headroom")
    tiny_model(layers=LAYERS).save_pretrained(folder / "tiny")
    tiny_base().tokenizer.save_pretrained(folder / "tiny")
    words = [f"{index * index} sheep and {index} dogs. " for index in range(200)]
    (folder / "text.txt").write_text("".join(words))
    made = command(app, folder, "plan", "--length", 32, "--drop", 2, "--output", folder / "p.json")
    assert made.exit_code == 0, made.output
    return folder


def command(app: typer.Typer, folder: Path, *options: object) -> Result:
    arguments = [str(each) for each in (*options, "--model", folder / "tiny")]
    return CliRunner().invoke(app, arguments, env={"ATTNDROP_CACHE_DIR": str(folder / "cache")})


def request(folder: Path) -> HealRequest:
    texts = (str(folder / "text.txt"),)
    corpus = CorpusRequest(written=0, texts=texts, prompts=(), answers=1, length=32, seed=0)
    return HealRequest(2, corpus, TRAINING)


def plan_of(folder: Path) -> Plan:
    return read_with_substitutes(folder / "p.json")[0]


@pytest.fixture(scope="module")
def found(folder) -> dict[str, Outcome]:
    """What every set gives; the base model's weights are the same afterwards, to the bit."""
    base = tiny_base(layers=LAYERS)
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    (folder / "kept").mkdir()
    healer = Healer(base, plan_of(folder), None, folder / "kept")
    task = healer.prepared(request(folder))
    start = healer.trainees(task)
    rates = [f"{name}={OWN_RATE}" for name in SETS if name != MAPS]
    outcomes = {
        each.set: _outcome(base, task, start, each, RANK, silent)
        for each in trials(list(SETS), TRAINING, rates, "cpu")
    }
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(weight.requires_grad for weight in base.model.parameters())
    return outcomes


@pytest.mark.parametrize("name", SETS)
def test_every_set_begins_with_the_fit_and_gets_better(found, name):
    outcome, maps = found[name], found[MAPS]
    judged = (maps.before, outcome.before, outcome.after)
    for fitted, own, trained in zip(*map(kls, judged), strict=True):
        assert own == pytest.approx(fitted, rel=1e-4)
        assert trained < own
    assert outcome.steps == TRAINING.steps
    assert outcome.rate == (None if name == MAPS else OWN_RATE)


def kls(judged: Judged) -> tuple[float, float]:
    """Return the mean KL on rows that are held out, and on rows that are not."""
    return mean_kl(judged.held_out), mean_kl(judged.trained_on)


def test_more_that_is_free_comes_nearer(found):
    reached = {name: mean_kl(each.after.trained_on) for name, each in found.items()}
    for part in ("maps+attention", "maps+mlps"):
        assert reached[WEIGHTS] < reached["maps+all"] < reached[part] < reached[MAPS]
    assert reached["maps+scales"] < reached[MAPS]


def test_maps_are_what_heal_trains(folder, found, tmp_path):
    healer = Healer(tiny_base(layers=LAYERS), plan_of(folder), None, tmp_path)
    healing = healer.heal(request(folder))
    assert healing.distilled.qualities == found[MAPS].after.held_out
    assert healing.fitted == found[MAPS].before.held_out
    size, _ = healing.substitutes.size(healing.plan.dropped_layers())
    assert size == found[MAPS].parameters


def test_parameters_are_those_that_a_set_names(found):
    width, kept, layers = 32, LAYERS - 2, LAYERS
    projections = [(width, 32), (width, 16), (width, 16), (32, width)]  # q, k, v, o
    attention = kept * RANK * sum(sum(shape) for shape in projections)
    mlps = layers * (RANK * 2 * width + width)
    own = {name: each.parameters - found[MAPS].parameters for name, each in found.items()}
    assert own["maps+scales"] == (kept + layers) * width
    assert own["maps+attention"] == attention
    assert own["maps+mlps"] == mlps
    assert own["maps+all"] == attention + mlps


@pytest.mark.parametrize("family", ["phi3", "gemma2", "olmo2", "granite"])
@pytest.mark.parametrize("name", SETS)
def test_additions_are_nothing_to_begin_with_and_all_of_them_get_gradients(family, name):
    base = tiny_base(family, layers=4)
    tokens = torch.randint(4, 70, (2, 16), generator=torch.Generator().manual_seed(1))
    own = student(base, [1], name, rank=RANK, seed=0)
    plain, twin = Twin(base, [1]), Twin(base, [1], layers=own.layers)
    replacements = {1: None}
    expected = plain.pruned(plain.full(tokens), replacements)
    given = twin.pruned(twin.full(tokens), replacements)
    torch.testing.assert_close(given, expected)
    if own.parts:
        given.square().sum().backward()
        unused = {part for part, each in own.parts.items() if each.grad is None}
        assert unused <= {part for part in own.parts if part.startswith("own.1.attention.norm")}
    if name not in (MAPS, WEIGHTS):
        assert own.layers is not None
        assert _frozen(own.layers) <= {id(each) for each in base.model.parameters()}


def _frozen(layers: Sequence[WrappedLayer]) -> set[int]:
    parameters = nn.ModuleList(layers).parameters()
    return {id(each) for each in parameters if not each.requires_grad}


@pytest.mark.parametrize("name", ["maps+all", WEIGHTS])
def test_compiled_layers_give_the_same_gradients(name, monkeypatch):
    compile_ = torch.compile  # traced and differentiated as on a GPU; run by torch's operators
    monkeypatch.setattr(torch, "compile", partial(compile_, backend="aot_eager"))
    base = tiny_base(layers=4)
    tokens = torch.randint(4, 70, (2, 16), generator=torch.Generator().manual_seed(1))
    gradients = []
    for compiled in (False, True):
        own = student(base, [1], name, rank=RANK, seed=0)
        twin = Twin(base, [1], compiled=compiled, layers=own.layers)
        twin.pruned(twin.full(tokens), {1: None}).square().sum().backward()
        gradients.append([each.grad for each in own.parts.values() if each.grad is not None])
    for plain, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)


def test_rates_are_heals_the_sets_own_or_those_given():
    found = list(trials(["maps", "weights"], TRAINING, ["weights=1e-4,2e-4"], "cpu"))
    assert [(each.maps_rate, each.rate) for each in found] == [
        (0.02, None),
        (0.02, 1e-4),
        (0.02, 2e-4),
    ]
    (only,) = trials(["maps"], TRAINING, ["maps=0.1"], "cuda")
    assert (only.maps_rate, only.rate) == (0.1, None)
    for sets, rates, message in (
        (["map"], [], "there are no sets"),
        (["maps"], ["map=1"], "there are no sets"),
        (["maps"], ["maps"], "must be SET=RATE"),
        (["maps"], ["maps=2"], "above 0 and at most 1"),
    ):
        with pytest.raises(HealError, match=message):
            list(trials(sets, TRAINING, rates, "cpu"))
    assert replace(TRAINING, learning_rate=0.1).rate(0.05) == pytest.approx(0.1)


def test_the_command_prints_and_writes_a_row_for_every_trial(folder):
    own = typer.Typer()
    own.command()(main)
    shared = ["--plan", folder / "p.json", "--text", folder / "text.txt", "--written", 0]
    shared += ["--length", 32, "--batch", 4, "--rank", 2]
    made = command(own, folder, *shared, "--corpus-only")
    assert (made.exit_code, made.stdout) == (0, "")
    options = ["--steps", 4, "--judge-every", 2, "--sets", "maps,maps+scales", "--learning-rate"]
    options += ["maps+scales=0.001,0.01", "--json", folder / "out.json"]
    result = command(own, folder, *shared, *options)
    assert result.exit_code == 0, result.output
    assert "fitted" in result.stdout
    body = json.loads((folder / "out.json").read_text())
    assert [(row["set"], row["rate"]) for row in body["rows"]] == [
        ("maps", None),
        ("maps+scales", 0.001),
        ("maps+scales", 0.01),
    ]
    (name,) = body["full"]
    assert all(row["after"]["held_out"][name]["kl"] > 0 for row in body["rows"])
