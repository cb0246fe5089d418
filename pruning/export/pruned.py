"""What every format is given: a checkpoint, its plan, and which tensors are left of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruning.export.checkpoint import Checkpoint, StoredTensor
from pruning.families import Family, family_of
from pruning.plan import Plan, write_plan

LAYERS = "model.layers"
"""Where every supported family keeps its decoder layers, as tensors are named."""

PLAN_FILE = "attndrop_plan.json"

# What belongs to a model besides its weights and config.
_SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
)


@dataclass(frozen=True, slots=True)
class Pruned:
    """A base model with a number of its attention sublayers dropped."""

    checkpoint: Checkpoint
    plan: Plan
    """Its `drop` says how many layers are dropped."""
    name: str
    """What clients call the model."""
    source_gguf: Path | None
    """The GGUF file that the checkpoint was converted from, if it was."""

    @property
    def config(self) -> Any:
        return self.checkpoint.config

    @property
    def family(self) -> Family:
        return family_of(self.config)

    @property
    def dropped(self) -> frozenset[int]:
        return self.plan.dropped_layers()

    @property
    def dropping_order(self) -> list[int]:
        return [step.layer for step in self.plan.ranking[: self.plan.drop]]

    def tensors_left(self) -> Iterator[StoredTensor]:
        """Yield the weights without those of dropped attention sublayers, as stored."""
        gone = tuple(self._prefixes_dropped())
        for name, tensor in self.checkpoint.tensors.items():
            if not name.startswith(gone):
                yield tensor

    def _prefixes_dropped(self) -> Iterator[str]:
        family = self.family
        parts = (family.attention, family.attention_norm, family.attention_post_norm)
        for layer in self.dropped:
            yield from (f"{LAYERS}.{layer}.{part}." for part in parts if part)


@dataclass(frozen=True, slots=True)
class Options:
    """How an export is written."""

    shard_bytes: int
    gguf_type: str


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json."""
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def write_side_files(folder: Path, pruned: Pruned) -> None:
    """Copy the tokenizer, chat template, generation config and licence, and write the plan."""
    for pattern in _SIDE_FILES:
        for path in sorted(pruned.checkpoint.folder.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    write_plan(folder / PLAN_FILE, pruned.plan)


def copy_remote_code(folder: Path, names: Sequence[str], replace: dict[str, str]) -> None:
    """Copy files of `remote/`, the code that a checkpoint brings along, with words replaced."""
    for name in names:
        text = (Path(__file__).parent / "remote" / name).read_text(encoding="utf-8")
        for word, other in replace.items():
            text = text.replace(word, other)
        (folder / name).write_text(text, encoding="utf-8")
