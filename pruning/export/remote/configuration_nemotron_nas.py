"""Configuration of the Nemotron-NAS architecture: Llama whose layers say which parts they have.

`block_configs` holds one entry a layer. Engines read it by attribute, as in
`config.block_configs[3].attention.no_op`; config.json keeps it as plain objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import LlamaConfig


class Block(dict[str, Any]):
    """A JSON object whose keys are attributes too."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        super().__init__({key: _block(value) for key, value in entries.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __reduce__(self) -> tuple[type[Block], tuple[dict[str, Any]]]:
        return (Block, (dict(self),))

    def __deepcopy__(self, _: Any) -> Block:
        return Block(self)


def _block(value: Any) -> Any:
    return Block(value) if isinstance(value, dict) else value


class NemotronNASConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    model_type = "nemotron-nas"

    def __init__(self, block_configs: Iterable[Mapping[str, Any]] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [_block(block) for block in block_configs]
