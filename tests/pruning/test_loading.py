"""Loading the embedded model and refusing what is not one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pruning.loading import (
    EMBEDDED_MODEL,
    BaseModel,
    ModelError,
    cache_folder,
    load_base_model,
    model_fingerprint,
    served_name,
)
from tests.pruning.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder of a tiny model."""
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer(False).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_the_embedded_model(base: BaseModel) -> None:
    assert base.name == EMBEDDED_MODEL
    assert base.layers == 30
    assert base.model.dtype == torch.float32
    converted = [path.name for path in (cache_folder() / "models").iterdir()]
    assert len([name for name in converted if name.startswith(EMBEDDED_MODEL)]) == 1
    assert not [name for name in converted if name.startswith(".")], "a conversion was left behind"


def test_a_folder(folder: Path) -> None:
    loaded = load_base_model(str(folder), device="cpu")
    assert (loaded.name, loaded.layers) == ("tiny", 4)


def test_the_fingerprint_is_of_the_weights_not_of_their_dtype(folder: Path) -> None:
    first = load_base_model(str(folder), device="cpu").fingerprint
    assert load_base_model(str(folder), device="cpu", dtype="bfloat16").fingerprint == first
    assert model_fingerprint(tiny_model(seed=1)) != first
    assert model_fingerprint(tiny_model(seed=0)) == first


@pytest.mark.parametrize(
    ("source", "options", "sentence"),
    [
        ("no/such-model", {}, "cannot load model 'no/such-model'"),
        ("missing.gguf", {}, "there is no GGUF file 'missing.gguf'"),
        (EMBEDDED_MODEL, {"dtype": "int3"}, "dtype 'int3' is not one of auto, float32"),
        (EMBEDDED_MODEL, {"device": "abacus"}, "device 'abacus' cannot be used"),
    ],
)
def test_what_cannot_be_loaded(
    source: str, options: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=sentence):
        load_base_model(source, **options)


def test_a_damaged_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNDROP_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match="cannot read GGUF file"):
        load_base_model(str(tmp_path / "bad.gguf"))
    assert not list((tmp_path / "cache" / "models").iterdir())


def test_an_unknown_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="family 'gpt2' is not supported"):
        load_base_model(str(tmp_path))


def test_names() -> None:
    assert served_name("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert served_name(str(Path(__file__).parent)) == "pruning"
