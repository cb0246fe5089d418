"""An export holds little in memory and leaves nothing half done; what is damaged is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pruning.export.checkpoint import read_checkpoint
from pruning.export.errors import ExportError
from pruning.export.exporting import export
from pruning.families import FAMILIES
from pruning.plan import write_plan
from tests.export.tiny_checkpoints import load, plan_for, save_checkpoint

# What an export adds to the process's memory, after one of a tiny model has loaded all code.
MEASURE = """
import resource, sys
from pathlib import Path
from pruning.export.exporting import export
from pruning.plan import read_plan

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

folder, format_name = Path(sys.argv[1]), sys.argv[2]
for name in ("tiny", "large"):
    before = peak()
    plan = read_plan(folder / f"{name}.json")
    export(str(folder / name), plan, format_name, folder / f"{name}-{format_name}")
print(peak() - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, and one of 16 shards of 20 MB, each with a plan."""
    folder = tmp_path_factory.mktemp("models")
    save_checkpoint(folder / "tiny", layers=2)
    save_checkpoint(
        folder / "large",
        layers=16,
        shard="20MB",
        hidden_size=512,
        intermediate_size=2560,
        num_attention_heads=8,
    )
    for name in ("tiny", "large"):
        write_plan(folder / f"{name}.json", plan_for(load(folder / name), 1))
    return folder


def test_memory_stays_below_the_largest_shard(folder):
    sizes = [path.stat().st_size for path in (folder / "large").glob("*.safetensors")]
    assert len(sizes) >= 15
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, "nemotron-nas"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(measured.stdout) < 1.2 * max(sizes)


def test_an_error_leaves_nothing(folder, tmp_path):
    def fail(what: str, done: int, total: int) -> None:
        if done > 5:
            raise KeyboardInterrupt

    plan = plan_for(load(folder / "large"), 1)
    for format_name in ("transformers", "gguf"):
        with pytest.raises(KeyboardInterrupt):
            export(str(folder / "large"), plan, format_name, tmp_path / "out", progress=fail)
        assert os.listdir(tmp_path) == []


def test_an_interrupted_command_leaves_nothing(folder, tmp_path):
    out = tmp_path / "out"
    large = ["--model", folder / "large", "--plan", folder / "large.json"]
    command = [sys.executable, "-m", "server.cli", "export", *large, "--format", "gguf", out]
    process = subprocess.Popen(
        [*command, "--gguf-type", "q4_1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while not list(tmp_path.glob(".out-*/*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, said.decode()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_fingerprint_is_that_of_the_loaded_model(family, tmp_path):
    source = save_checkpoint(tmp_path / "base", family, shard="300KB")
    assert read_checkpoint(source).fingerprint() == load(source).fingerprint


class TestDamaged:
    @pytest.fixture
    def source(self, tmp_path) -> Path:
        return save_checkpoint(tmp_path / "base", layers=2)

    def check(self, source, message):
        with pytest.raises(ExportError, match=message):
            read_checkpoint(source)

    def test_no_weights(self, source):
        (source / "model.safetensors").unlink()
        self.check(source, r"has neither model.safetensors nor model.safetensors.index.json")

    def test_not_safetensors(self, source):
        (source / "model.safetensors").write_bytes(b"\xff" * 100)
        self.check(source, "is not a safetensors file .*fetch it again")

    def test_cut_off(self, source):
        whole = (source / "model.safetensors").read_bytes()
        (source / "model.safetensors").write_bytes(whole[:-100])
        self.check(source, "lies outside of it")

    def test_a_weight_is_missing(self, source):
        save_file({"model.norm.weight": torch.ones(64)}, source / "model.safetensors")
        self.check(source, "lacks the weight model.embed_tokens.weight")

    def test_a_weight_of_another_shape(self, source):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 512}))
        self.check(source, r"has shape \(256, 64\), but its config says \(512, 64\)")

    def test_quantised_weights(self, source):
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8"}
        (source / "config.json").write_text(json.dumps(config))
        self.check(source, "holds quantised weights")

    def test_an_unknown_family(self, source):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
        self.check(source, "model family 'gpt2' is not supported; supported families: gemma2")

    def test_an_index_that_leaves_the_folder(self, source):
        (source / "model.safetensors").unlink()
        index = {"weight_map": {"model.norm.weight": "../../etc/passwd"}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        self.check(source, r"names the file '../../etc/passwd', which is not in its folder")
