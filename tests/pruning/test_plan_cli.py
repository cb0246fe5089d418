"""`attndrop plan` from the outside: files, stdout, stderr and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from pruning.cli import plan_app
from pruning.plan import read_plan, read_with_substitutes
from pruning.substitutes import SubstituteError
from tests.pruning.tiny_models import tiny_base, tiny_model

app = typer.Typer()
app.add_typer(plan_app, name="plan")


@app.command()
def other() -> None:
    """A second command, as the whole command line has."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A checkpoint folder of a tiny model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(layers=6).save_pretrained(folder)
    tiny_base().tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ATTNDROP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


SMALL = ("--samples", 2, "--length", 12)


def test_compute_is_the_default_command(model, tmp_path):
    out = tmp_path / "plan.json"
    result = run("--model", model, "--drop", "2", "--output", out, *SMALL)
    assert (result.exit_code, result.stdout) == (0, "")
    plan = read_plan(out)
    assert (plan.drop, plan.model.name, plan.model.layers) == (2, "tiny", 6)
    assert f"plan {plan.id} (computed) in {out}: drops 2 of 6 layers of tiny" in result.stderr


def test_without_output_stdout_is_the_plan_and_nothing_else(model):
    result = run("compute", "--model", model, "--drop", "50%", *SMALL)
    assert json.loads(result.stdout)["drop"] == 3


def test_the_second_time_comes_from_the_cache_unless_forced(model, cache):
    assert "(computed)" in run("--model", model, *SMALL).stderr
    assert "(cached)" in run("--model", model, "--drop", "3", *SMALL).stderr
    assert "(computed)" in run("--model", model, "--force", *SMALL).stderr
    assert len(list(cache.glob("*.json"))) == 1


def test_without_a_number_the_default_budget_chooses_and_says_what_it_gave(model):
    result = run("--model", model, *SMALL)
    plan = json.loads(result.stdout)
    assert plan["budget"] == {"max_kl": 0.2, "min_agreement": None, "max_perplexity_ratio": None}
    assert "on 11 held-out tokens: KL 0." in result.stderr
    assert "the budget was KL at most 0.2" in result.stderr


def test_budgets_choose_from_the_cached_curve(model):
    narrow = json.loads(run("--model", model, "--min-agreement", "0.999", *SMALL).stdout)
    wide = run("--model", model, "--drop", "auto", "--max-kl", "90", *SMALL)
    assert "(cached)" in wide.stderr
    assert (narrow["drop"], json.loads(wide.stdout)["drop"]) == (0, 5)


def test_greedy_with_substitutes_writes_them_beside_the_plan(model, tmp_path):
    out = tmp_path / "plan.json"
    options = ("--strategy", "greedy", "--substitutes", "linear", "--drop", "2")
    result = run("--model", model, *options, "--output", out, *SMALL)
    assert result.exit_code == 0, result.stderr
    assert f"2 substitutes: 2,112 parameters, 0.0 MiB in {tmp_path}/plan.safetensors" in " ".join(
        result.stderr.split()
    )
    plan, substitutes = read_with_substitutes(out)
    assert plan.substitutes.kind == "linear"
    assert set(substitutes.by_layer) == set(range(1, 6))
    shown = run("show", out).stdout
    assert "substitutes: linear" in shown
    assert "agreement" in shown
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(SubstituteError, match="keep that file beside the plan"):
        read_with_substitutes(out)


def test_a_search_says_what_it_gained(model, tmp_path):
    out = tmp_path / "plan.json"
    options = ("--strategy", "search", "--evaluations", 5, "--drop", "50%")
    result = run("--model", model, *options, "--output", out, *SMALL)
    assert result.exit_code == 0, result.stderr
    plan = read_plan(out)
    assert (plan.strategy, plan.drop, plan.searched.depth, plan.searched.tried) == (
        "search",
        3,
        3,
        5,
    )
    for text in (result.stderr, run("show", out).stdout):
        assert "searched 5 sets of 3 layers: " in text
        assert "greedy" in text
    result = run("--model", model, *options[:2], "--min-agreement", "0.9999", *SMALL)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "give another --drop or a wider budget" in result.stderr


def test_several_sources_are_named_in_the_plan(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 20)
    two = ("--calibration", "self", "--calibration", text)
    plan = json.loads(run("--model", model, *two, "--samples", 4, "--length", 12).stdout)
    assert plan["calibration"]["sources"][0] == "self"
    assert plan["calibration"]["sources"][1].startswith("text.txt sha256:")


def test_calibration_file_and_protected_layers(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 20)
    result = run("--model", model, "--calibration", text, "--protect", "1, 5", *SMALL)
    plan = json.loads(result.stdout)
    assert plan["protected"] == [0, 1, 5]
    assert plan["calibration"]["sources"][0].startswith("text.txt sha256:")
    assert plan["calibration"]["seed"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--drop", "6"], "cannot drop 6 of 6 layers: at most 5"),
        (["--drop", "many"], "drop must be a number of layers"),
        (["--protect", "1;2"], "--protect must be layer indices"),
        (["--protect", "9"], "protected layers [9] do not exist"),
        (["--strategy", "best"], "strategy 'best' is not one of cosine, greedy"),
        (["--max-kl", "0"], "--max-kl must be above 0"),
        (["--drop", "2", "--max-kl", "1"], "--drop 2 says how many layers"),
        (["--substitutes", "cubic"], "substitutes must be 'none', 'linear'"),
        (["--substitutes", "linear", "--output", "p.json"], "substitutes are fitted as the greedy"),
        (["--strategy", "greedy", "--substitutes", "linear"], "substitutes are written beside"),
        (["--samples", "1"], "1 samples of 1 sources leave nothing"),
        (["--calibration", "none.txt"], "there is no calibration file 'none.txt'"),
        (["--length", "1"], "length must be 2 to 128 tokens"),
        (["--model", "/none"], "cannot load model '/none'"),
        (["--output", "/none/plan.json"], "cannot write plan /none/plan.json"),
    ],
)
def test_a_users_mistake_is_one_sentence(model, options, message):
    result = run("--model", model, *SMALL, *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in result.stderr


class TestShow:
    def test_a_file(self, model, tmp_path):
        out = tmp_path / "plan.json"
        run("--model", model, "--drop", "2", "--protect", "4", "--output", out, *SMALL)
        result = run("show", out)
        assert result.exit_code == 0
        lines = result.stdout.splitlines()
        rows = {int(line.split()[0]): line for line in lines if line.split()[0].isdigit()}
        assert sorted(rows) == list(range(6))
        assert {layer for layer, row in rows.items() if "dropped" in row} == read_plan(
            out
        ).dropped_layers()
        assert "kept always" in rows[0]
        assert "kept, protected" in rows[4]
        assert sum("█" in row for row in rows.values()) == 4

    def test_another_drop_count_needs_no_measuring(self, model, tmp_path):
        out = tmp_path / "plan.json"
        run("--model", model, "--drop", "2", "--output", out, *SMALL)
        result = run("show", out, "--drop", "4")
        assert "drops 4 of 6 layers" in result.stdout
        assert result.stdout.count("dropped") == 4

    def test_a_models_newest_cached_plan(self, model):
        run("--model", model, *SMALL)
        result = run("show", "tiny")
        assert (result.exit_code, result.stderr) == (0, "")
        assert "2 x 12 tokens of self, seed 0" in result.stdout

    def test_neither_file_nor_model(self):
        result = run("show", "nothing")
        assert result.exit_code == 1
        assert result.stderr.startswith("error: 'nothing' is neither a plan file nor a model")


class TestLlmDrop:
    def test_import_show_and_export(self, model, tmp_path):
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"num_hidden_layers": 6, "drop_attn_list": [5, 2]}))
        out = tmp_path / "plan.json"
        imported = run("import-llm-drop", config, "--model", model, "--output", out)
        assert imported.exit_code == 0
        shown = run("show", out)
        assert "nothing was measured" in shown.stdout
        assert shown.stdout.count("dropped") == 2
        exported = run("export-llm-drop", out, config, "--drop", "1")
        assert exported.exit_code == 0
        assert json.loads(config.read_text())["drop_attn_list"] == [5]

    def test_mlps(self, model, tmp_path):
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"drop_attn_list": [5], "drop_mlp_list": [5, 3]}))
        out = tmp_path / "plan.json"
        imported = run("import-llm-drop", config, "--model", model, "--output", out)
        assert "drops 3 of 12 sublayers of tiny: attention of 5; MLPs of 3, 5" in imported.stderr
        shown = run("show", out, "--drop", "2").stdout
        assert shown.count("dropped") == 2
        assert "5 mlp" in shown
        config.write_text("{}")
        exported = run("export-llm-drop", out, config, "--drop", "2")
        assert "wrote attention of 5; MLPs of 5, dropped by plan" in exported.stderr
        assert json.loads(config.read_text()) == {"drop_attn_list": [5], "drop_mlp_list": [5]}


@pytest.mark.parametrize(
    ("target", "what"), [("mlp", "3 of 6 MLPs"), ("joint", "6 of 12 sublayers")]
)
def test_other_targets(model, target, what):
    result = run("--model", model, "--target", target, "--drop", "50%", *SMALL)
    assert json.loads(result.stdout)["target"] == target
    assert f"drops {what} of tiny: " in result.stderr
    result = run("--model", model, "--target", target, "--strategy", "greedy", *SMALL)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "ranks attention only" in result.stderr


def test_help_names_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    for name in ("compute", "show", "import-llm-drop", "export-llm-drop"):
        assert name in result.stdout
