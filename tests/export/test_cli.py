"""`attndrop export` from the outside."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner, Result

from pruning.plan import SubstitutesRecord, read_plan, write_plan
from pruning.plan_cache import PlanCache, PlanRequest
from server.cli import app
from tests.export.tiny_checkpoints import load, plan_for, save_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def plan(model, tmp_path):
    path = tmp_path / "plan.json"
    write_plan(path, plan_for(load(model), 4, 1, 5))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_a_plan_file_and_another_number_of_layers(model, plan, tmp_path):
    out = tmp_path / "out"
    result = run("--model", model, "--plan", plan, "--drop", "2", "--format", "llm-drop", out)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "exported tiny as llm-drop to" in result.stderr
    assert "attention of 2 of 6 layers dropped" in result.stderr
    assert (out / "config.json").is_file()


def test_without_a_plan_the_cached_one_is_taken(model, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNDROP_CACHE_DIR", str(tmp_path / "cache"))
    PlanCache(tmp_path / "cache" / "plans").compute(load(model), PlanRequest(samples=2, length=12))
    out = tmp_path / "out.gguf"
    result = run("--model", model, "--drop", "50%", "--format", "gguf", out)
    assert result.exit_code == 0, result.stderr
    assert out.stat().st_size > 10_000


def test_substitutes_are_not_left_out_silently(model, plan, tmp_path):
    record = SubstitutesRecord("linear", "sha256:" + 64 * "0")
    write_plan(path := tmp_path / "plan.json", replace(read_plan(plan), substitutes=record))
    result = run("--model", model, "--plan", path, "--format", "gguf", tmp_path / "out")
    assert result.exit_code == 1
    assert "puts substitutes in the places of dropped sublayers" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "onnx"], "format 'onnx' is not one of nemotron-nas"),
        (["--format", "gguf", "--gguf-type", "q2_k"], "gguf type 'q2_k' is not one of f32"),
        (["--format", "gguf", "--drop", "9"], "cannot drop 9 of 6 layers"),
        (["--format", "gguf", "--model", "/none"], "cannot load model '/none'"),
        (["--format", "gguf", "--plan", "/none.json"], "there is no plan file"),
    ],
)
def test_a_users_mistake_is_one_sentence(model, plan, tmp_path, options, message):
    result = run("--model", model, "--plan", plan, *options, tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()
