"""Format `llm-drop`: the unmodified weights, and the LLM-Drop project's keys in their config.

That project's own code skips what its config lists, so nothing is left out of the weights.
"""

from __future__ import annotations

import json
from pathlib import Path

from pruning.calibration import Progress
from pruning.export.output import whole_folder
from pruning.export.pruned import Options, Pruned, write_config, write_side_files
from pruning.export.shards import write_shards
from pruning.llm_drop import write_drop_lists

NAME = "llm-drop"


def export(pruned: Pruned, out: Path, options: Options, progress: Progress) -> None:
    """Write the folder.

    Raises:
        ExportError: the folder cannot be written.
        PlanError: the checkpoint drops MLPs already.
    """
    checkpoint = pruned.checkpoint
    with whole_folder(out) as folder:
        write_shards(folder, list(checkpoint.tensors.values()), options.shard_bytes, progress)
        write_side_files(folder, pruned)
        config = (checkpoint.folder / "config.json").read_text(encoding="utf-8")
        write_config(folder, json.loads(config))
        write_drop_lists(folder / "config.json", pruned.plan)
