"""Conversations: chat prompts from a file, and answers that a model writes to them.

Answers are sampled at temperature 1: one conversation at a time, each from a seed of its own, so
that two variants get the same random numbers; or, to train on, many together. Knows the chat
template and how to decode; knows nothing of scores.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pruning.attention import GrowingAttention
from pruning.calibration import CalibrationError, Progress, draw, json_records, rendered, silent
from pruning.loading import BaseModel
from pruning.sublayers import rows_attending


@dataclass(frozen=True, slots=True, eq=False)
class Conversation:
    """A prompt and the answer to it."""

    prompt: Tensor
    """[tokens] of the rendered prompt, up to where the answer begins."""
    answer: Tensor
    """[tokens], the end token included if there is one."""
    finished: bool
    """Whether the answer ended by itself."""


def prompts_in(path: str) -> int:
    """Return how many prompts a JSON-lines file holds.

    Raises:
        CalibrationError: it is not readable, too large, or not JSON lines.
    """
    return len(json_records(Path(path)))


def chat_prompts(path: str, base: BaseModel, count: int) -> list[Tensor]:
    """Return `count` prompts of a JSON-lines file at an even stride, as rendered tokens.

    Each line has `messages` (what follows the last user message is left out), `prompt`, or `turns`,
    of which the first is taken.

    Raises:
        CalibrationError: the file is not usable or holds fewer prompts.
    """
    records = json_records(Path(path))
    if len(records) < count:
        raise CalibrationError(f"{path} holds {len(records)} prompts, fewer than the {count} asked")
    chosen = [index * len(records) // count for index in range(count)]
    texts = [
        rendered(_messages(path, index + 1, records[index]), base.tokenizer, for_answer=True)
        for index in chosen
    ]
    return [torch.tensor(base.tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def answered(
    base: BaseModel, prompt: Tensor, most: int, seed: int, dropped: Collection[int] = ()
) -> Conversation:
    """Return a prompt [tokens] with the answer that a variant writes, of at most `most` tokens.

    The substitutes that stand in the base model's dropped sublayers are used.
    """
    generator = torch.Generator().manual_seed(seed)
    attend, ids, start = GrowingAttention(), prompt, 0
    answer: list[int] = []
    while len(answer) < most and not base.end_tokens.intersection(answer[-1:]):
        logits = _logits(base, ids, start, attend, dropped)
        start += len(ids)
        ids = draw(logits, generator)[0]
        answer.append(int(ids))
    return Conversation(prompt, torch.tensor(answer), answer[-1] in base.end_tokens)


def answered_together(
    base: BaseModel, prompts: Sequence[Tensor], most: int, seed: int, progress: Progress = silent
) -> list[Conversation]:
    """Return prompts, each [tokens], with the full model's answers of at most `most` tokens, in
    order. All are written at once: many times faster than one by one, and with other random
    numbers."""
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    ids = torch.stack([functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    generator = torch.Generator().manual_seed(seed)
    attend = GrowingAttention(padding.to(base.device))
    columns: list[Tensor] = []
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    ends = torch.tensor(sorted(base.end_tokens))
    while len(columns) < most and not bool(ended.all()):
        start = longest + len(columns) - ids.shape[1]
        positions = torch.arange(start, start + ids.shape[1]) - padding[:, None]
        ids = draw(_batch_logits(base, ids, positions.clamp(min=0), attend), generator)
        columns.append(ids)
        ended |= torch.isin(ids[:, 0], ends)
        progress("writing answers", len(columns), most)
    written = torch.cat(columns, dim=1)
    return [
        _ended(prompt, row, ends) for prompt, row in zip(prompts, written.unbind(), strict=True)
    ]


def _ended(prompt: Tensor, written: Tensor, ends: Tensor) -> Conversation:
    """Return the conversation up to the first end token, which is kept."""
    found = torch.isin(written, ends).nonzero()[:1].flatten().tolist()
    answer = written[: found[0] + 1] if found else written
    return Conversation(prompt, answer, bool(found))


@torch.inference_mode()
def _batch_logits(
    base: BaseModel, ids: Tensor, positions: Tensor, attend: GrowingAttention
) -> Tensor:
    """Return the logits after ids at positions, both [batch, rows], as [batch, vocabulary]."""
    output = base.model(
        ids.to(base.device),
        position_ids=positions.to(base.device),
        attend=attend,
        logits_to_keep=1,
    )
    return output.logits[:, -1]  # type: ignore[no-any-return]


@torch.inference_mode()
def _logits(
    base: BaseModel, ids: Tensor, start: int, attend: GrowingAttention, dropped: Collection[int]
) -> Tensor:
    """Return the logits after ids [rows] at positions from `start` on, [1, vocabulary]."""
    positions = torch.arange(start, start + len(ids), device=base.device)
    output = base.model(
        ids[None].to(base.device),
        position_ids=positions[None],
        attend=attend,
        attending_rows=rows_attending(base.layers, len(ids), set(dropped)),
        logits_to_keep=1,
    )
    return output.logits[:, -1]  # type: ignore[no-any-return]


def _messages(path: str, line: int, record: Any) -> list[dict[str, Any]]:
    """Return the messages up to the last one of the user."""
    if isinstance(record, dict):
        if isinstance(record.get("prompt"), str):
            return [{"role": "user", "content": record["prompt"]}]
        turns = record.get("turns")
        if isinstance(turns, list) and turns and isinstance(turns[0], str):
            return [{"role": "user", "content": turns[0]}]
        messages = record.get("messages")
        if isinstance(messages, list) and all(isinstance(each, dict) for each in messages):
            users = [i for i, each in enumerate(messages) if each.get("role") == "user"]
            if users:
                return messages[: users[-1] + 1]
    raise CalibrationError(
        f"{path}, line {line}: it needs 'messages' with one of the user, 'prompt', or 'turns'"
    )
