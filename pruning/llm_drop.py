"""The config.json format of the LLM-Drop project, the paper's own code.

There, a checkpoint says in its config which sublayers are dropped: `drop_attn_list` and
`drop_mlp_list`, each a list of layer indices in the order of dropping, or a list of one boolean per
layer. This file turns such lists into plans and plans into such lists.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruning.files import write_atomically
from pruning.loading import BaseModel
from pruning.plan import Plan, PlanError, new_plan
from pruning.selection import ALWAYS_KEPT, DropStep
from pruning.targets import ATTENTION, JOINT, MLP

STRATEGY = "llm-drop"
"""The strategy named in imported plans: the order is known, the costs are not."""

ATTENTION_KEY = "drop_attn_list"
MLP_KEY = "drop_mlp_list"

_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class DropLists:
    """The dropped layers of an LLM-Drop checkpoint, in the order of the file."""

    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    layers: int | None
    """How many layers the config says the model has."""


def read_drop_lists(config_path: Path) -> DropLists:
    """Read the drop lists of an LLM-Drop config.json; a missing list is empty.

    Raises:
        PlanError: not readable, not a config, or a list is malformed.
    """
    return _drop_lists(config_path, _read_config(config_path))


def plan_from_llm_drop(config_path: Path, base: BaseModel) -> Plan:
    """Return a plan for `base` that drops what an LLM-Drop config.json drops.

    Nothing was measured here, so the costs are None; the ranking holds the listed layers only. It
    is joint where both lists hold some: attention first, since the config knows no order of both.

    Raises:
        PlanError: the lists are empty, drop layer 0, or are for another number of layers.
    """
    lists = read_drop_lists(config_path)
    _check_layers(config_path, lists, len(base.sublayers), base.name)
    if not lists.attention and not lists.mlp:
        raise PlanError(
            f"{config_path} drops nothing: its {ATTENTION_KEY} and {MLP_KEY} are empty or absent"
        )
    for key, what, listed in (
        (ATTENTION_KEY, "attention", lists.attention),
        (MLP_KEY, "MLP", lists.mlp),
    ):
        if ALWAYS_KEPT in listed:
            raise PlanError(
                f"{config_path} drops the {what} of layer {ALWAYS_KEPT}, which must be kept; "
                f"remove it from {key}"
            )
    target = JOINT if lists.attention and lists.mlp else ATTENTION if lists.attention else MLP
    steps = [DropStep(layer, None, sublayer=ATTENTION) for layer in lists.attention]
    steps += [DropStep(layer, None, sublayer=MLP) for layer in lists.mlp]
    ranking = tuple(each if target == JOINT else DropStep(each.layer, None) for each in steps)
    plan = new_plan(base, STRATEGY, ranking, (ALWAYS_KEPT,), None, target=target)
    return plan.with_drop(len(ranking))


def write_drop_lists(config_path: Path, plan: Plan, count: int | None = None) -> None:
    """Write the layers a plan drops into an existing config.json; all other keys stay.

    Args:
        config_path: the config.json of a checkpoint of the plan's base model.
        count: how many layers to drop; by default the plan's own number.

    Raises:
        PlanError: not readable or writable, for another number of layers, it drops MLPs, or the
            plan has substitutes, which a config cannot carry.
    """
    if plan.substitutes is not None:
        raise PlanError(
            f"plan {plan.id} has substitutes, and this format cannot carry them; export a plan "
            "that was made without --substitutes"
        )
    dropped = plan.dropped(count)
    config = _read_config(config_path)
    lists = _drop_lists(config_path, config)
    _check_no_mlp(config_path, lists)
    _check_layers(config_path, lists, plan.model.layers, plan.model.name)
    config[ATTENTION_KEY] = _in_order(plan, dropped.attention, MLP)
    config[MLP_KEY] = _in_order(plan, dropped.mlps, ATTENTION)
    try:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        write_atomically(config_path, text.encode())
    except OSError as error:
        raise PlanError(
            f"cannot write {config_path}: {error.strerror}; check the folder's permissions"
        ) from error


def _in_order(plan: Plan, dropped: frozenset[int], other: str) -> list[int]:
    """Return the layers that lose a sublayer in the order in which they do; steps of a joint
    ranking that drop the `other` one say nothing of it."""
    steps = [step for step in plan.ranking if step.sublayer != other]
    return [step.layer for step in steps if step.layer in dropped]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= _MAX_CONFIG_BYTES else ""
        config = json.loads(text)
    except OSError as error:
        raise PlanError(
            f"cannot read config {path}: {error.strerror}; give the config.json of a checkpoint"
        ) from error
    except (ValueError, RecursionError) as error:
        raise PlanError(
            f"config {path} is not JSON of at most {_MAX_CONFIG_BYTES} bytes"
        ) from error
    if not isinstance(config, dict):
        raise PlanError(f"config {path} must hold a JSON object, not a {type(config).__name__}")
    return config


def _drop_lists(path: Path, config: dict[str, Any]) -> DropLists:
    return DropLists(
        _layer_list(path, config, ATTENTION_KEY),
        _layer_list(path, config, MLP_KEY),
        config.get("num_hidden_layers"),
    )


def _layer_list(path: Path, config: dict[str, Any], key: str) -> tuple[int, ...]:
    """Return the layer indices under `key`: given as they are, or as one boolean per layer."""
    given = config.get(key) or []
    flags = isinstance(given, list) and all(isinstance(each, bool) for each in given)
    if flags and len(given) in (0, config.get("num_hidden_layers", len(given))):
        return tuple(layer for layer, dropped in enumerate(given) if dropped)
    if isinstance(given, list) and all(type(each) is int for each in given):
        return tuple(given)
    raise PlanError(f"{key} in {path} must be a list of layer indices, or of one boolean per layer")


def _check_no_mlp(path: Path, lists: DropLists) -> None:
    if lists.mlp:
        raise PlanError(
            f"{path} drops the MLPs of layers {list(lists.mlp)} already; use a checkpoint whose "
            f"{MLP_KEY} is empty"
        )


def _check_layers(path: Path, lists: DropLists, layers: int, model: str) -> None:
    if lists.layers is not None and lists.layers != layers:
        raise PlanError(
            f"{path} is for a model of {lists.layers} layers, but {model} has {layers}; give the "
            "config.json of the same model"
        )
