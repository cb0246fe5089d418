"""From a model, a plan and a format's name to the exported checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pruning.calibration import Progress, silent
from pruning.export import gguf_file, llm_drop_folder, nemotron_nas, transformers_folder
from pruning.export.checkpoint import Checkpoint, read_checkpoint
from pruning.export.errors import ExportError
from pruning.export.output import check_free
from pruning.export.pruned import Options, Pruned
from pruning.loading import checkpoint_folder, served_name
from pruning.loading import gguf_file as gguf_source
from pruning.plan import Plan
from pruning.targets import ATTENTION

Exporter = Callable[[Pruned, Path, Options, Progress], None]

FORMATS: Mapping[str, Exporter] = {
    module.NAME: module.export
    for module in (nemotron_nas, transformers_folder, llm_drop_folder, gguf_file)
}
DEFAULT_OPTIONS = Options(shard_bytes=5 * 10**9, gguf_type="f16")


def export(
    model: str,
    plan: Plan,
    format_name: str,
    out: Path,
    *,
    options: Options = DEFAULT_OPTIONS,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> None:
    """Write the model, without what the plan drops, in a format.

    Args:
        model: as for `loading.load_base_model`; its weights are read, never loaded.
        plan: a plan of this model; its `drop` says how many layers.
        out: the folder, or for `gguf` the file, which must not exist yet.

    Raises:
        ExportError: unknown format, a model that the format cannot express, or an unusable `out`.
        ModelError: the model cannot be found.
        PlanError: the plan was made for another model.
    """
    if format_name not in FORMATS:
        raise ExportError(f"format {format_name!r} is not one of {', '.join(FORMATS)}")
    if plan.substitutes is not None:
        raise ExportError(
            f"plan {plan.id} puts substitutes in the places of dropped sublayers, which no format "
            "can carry; export a plan that was made without --substitutes"
        )
    if plan.dropped().mlps and format_name != llm_drop_folder.NAME:
        raise ExportError(
            f"plan {plan.id} drops MLPs, which of these formats only {llm_drop_folder.NAME} can "
            f"express; export a plan made with --target {ATTENTION}"
        )
    check_free(out)
    checkpoint = read_checkpoint(checkpoint_folder(model), trust_remote_code=trust_remote_code)
    name = served_name(model)
    _check_fits(plan, checkpoint, name)
    FORMATS[format_name](Pruned(checkpoint, plan, name, gguf_source(model)), out, options, progress)


def _check_fits(plan: Plan, checkpoint: Checkpoint, name: str) -> None:
    plan.check_fits_model(name, checkpoint.config.num_hidden_layers, checkpoint.fingerprint())
