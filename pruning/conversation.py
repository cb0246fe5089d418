"""Conversations: chat prompts from a file, and answers that a model writes to them.

Answers are written in batches over a dense KV cache. Where they are drawn, each has a seed of its
own, so that two variants get the same random numbers. Knows the chat template and how to decode;
knows nothing of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pruning.attention import GrowingAttention
from pruning.calibration import (
    CalibrationError,
    Progress,
    drawn_at,
    json_records,
    rendered,
    silent,
)
from pruning.families import kv_shape
from pruning.loading import BaseModel
from pruning.sublayers import rows_kept
from pruning.targets import NO_SUBLAYERS, Sublayers

_MESSAGE = "attndrop"
"""Stands for what a user says, to find out where that begins."""
_TOGETHER = {"cpu": 8, "cuda": 256}
"""Answers that are written at one time at most, ..."""
_CACHE_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
"""... and what keys and values may take; up to three times as much for moments."""


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


def chat_messages(path: Path, count: int) -> list[list[dict[str, Any]]]:
    """Return the messages of `count` lines of a JSON-lines file at an even stride, up to where an
    answer is wanted.

    Each line has `messages` (what follows the last user message is left out), `prompt`, or `turns`,
    of which the first is taken.

    Raises:
        CalibrationError: the file is not usable or holds fewer prompts.
    """
    records = json_records(path)
    if len(records) < count:
        raise CalibrationError(f"{path} holds {len(records)} prompts, fewer than the {count} asked")
    chosen = [index * len(records) // count for index in range(count)]
    return [_messages(str(path), index + 1, records[index]) for index in chosen]


def prompt_tokens(base: BaseModel, messages: list[dict[str, Any]]) -> Tensor:
    """Return messages as the chat template renders them, up to where the answer begins, [tokens].

    Raises:
        CalibrationError: the template cannot render them.
    """
    text = rendered(messages, base.tokenizer, for_answer=True)
    return torch.tensor(base.tokenizer.encode(text, add_special_tokens=False))


def chat_prompts(path: str, base: BaseModel, count: int) -> list[Tensor]:
    """Return the tokens of `count` prompts of a file: both of the above."""
    return [prompt_tokens(base, messages) for messages in chat_messages(Path(path), count)]


def written_prompts(
    base: BaseModel, count: int, most: int, seed: int, progress: Progress = silent
) -> list[Tensor]:
    """Return the tokens of prompts that the model itself writes, up to where an answer begins.

    A chat model that is given its template up to where a user speaks goes on as a user would (Xu et
    al., arXiv 2406.08464). Messages of no words are left out, so there may be fewer than `count`.

    Args:
        most: tokens of a message at most.

    Raises:
        CalibrationError: there is no template, or it does not show a message as it is.
    """
    opening, found, _ = rendered([{"role": "user", "content": _MESSAGE}], base.tokenizer).partition(
        _MESSAGE
    )
    if not found:
        raise CalibrationError(f"the chat template of {base.name} does not show what a user says")
    start = torch.tensor(base.tokenizer.encode(opening, add_special_tokens=False))
    seeds = range(seed, seed + count)
    turns = sampled(base, [start] * count, most, seeds, progress=progress, what="writing prompts")
    texts = (str(base.tokenizer.decode(t.answer, skip_special_tokens=True)).strip() for t in turns)
    return [prompt_tokens(base, [{"role": "user", "content": text}]) for text in texts if text]


def sampled(
    base: BaseModel,
    prompts: Sequence[Tensor],
    most: int,
    seeds: Sequence[int],
    dropped: Sublayers = NO_SUBLAYERS,
    progress: Progress = silent,
    what: str = "writing answers",
) -> list[Conversation]:
    """Return each prompt [tokens] with the answer that a variant draws at temperature 1, of at most
    `most` tokens, from a seed of its own: answers do not depend on which others are asked for.

    The substitutes that stand in the base model's dropped sublayers are used.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(logits: Tensor, rows: Sequence[int]) -> Tensor:
        points = [torch.rand(1, generator=generators[r], dtype=torch.float64) for r in rows]
        return drawn_at(logits, torch.stack(points))

    return _answered(base, prompts, most, choose, dropped, partial(progress, what))


def greedy(
    base: BaseModel,
    prompts: Sequence[Tensor],
    most: int,
    dropped: Sublayers = NO_SUBLAYERS,
    progress: Progress = silent,
    what: str = "writing answers",
) -> list[Conversation]:
    """Return each prompt with the answer of the most likely tokens; otherwise as `sampled`."""

    def choose(logits: Tensor, rows: Sequence[int]) -> Tensor:
        return logits.argmax(-1, keepdim=True).cpu()

    return _answered(base, prompts, most, choose, dropped, partial(progress, what))


def rows_in_cache(base: BaseModel, length: int) -> int:
    """Return how many sequences of a length can be written together, at least 1: their keys and
    values have to find room."""
    shape = kv_shape(base.model.config.get_text_config())
    token = shape.layers * shape.bytes_per_token(base.model.dtype.itemsize)
    room = _CACHE_BYTES.get(base.device.type, _CACHE_BYTES["cpu"])
    return max(1, room // (token * length))


_Choose = Callable[[Tensor, Sequence[int]], Tensor]
"""Logits [rows, vocabulary] and which prompts the rows are of, to tokens [rows, 1] on the CPU."""


def _answered(
    base: BaseModel,
    prompts: Sequence[Tensor],
    most: int,
    choose: _Choose,
    dropped: Sublayers,
    progress: Callable[[int, int], None],
) -> list[Conversation]:
    """Answer prompts of like length together."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    longest = max(map(len, prompts), default=0) + most
    usual = _TOGETHER.get(base.device.type, _TOGETHER["cpu"])
    together = min(usual, rows_in_cache(base, longest))
    answers: dict[int, list[int]] = {}
    for first in range(0, len(order), together):
        rows = order[first : first + together]
        batch = _Batch(base, [prompts[row] for row in rows], dropped)
        for step in range(most):
            tokens = choose(batch.logits(), rows)[:, 0].tolist()
            batch.append(tokens)
            progress(first * most + (step + 1) * len(rows), len(prompts) * most)
            if batch.ended:
                break
        answers.update(zip(rows, batch.answers, strict=True))
    progress(len(prompts) * most, len(prompts) * most)
    ends = base.end_tokens
    return [
        Conversation(prompt, torch.tensor(answers[index]), answers[index][-1] in ends)
        for index, prompt in enumerate(prompts)
    ]


class _Batch:
    """Prompts of several lengths that grow by a token each, padded on the left.

    ::

        [  .  .  a  b  c | x  y  z ]     a, b, c: a prompt at positions 0, 1, 2
        [  d  e  f  g  h | u  .  . ]     an answer that has ended; what follows it is thrown away
    """

    def __init__(self, base: BaseModel, prompts: Sequence[Tensor], dropped: Sublayers) -> None:
        self._base, self._dropped = base, dropped
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        self._padding = torch.tensor(padding, device=base.device)[:, None]
        self._attend = GrowingAttention(self._padding[:, 0] if any(padding) else None)
        self._ids = torch.stack(
            [functional.pad(p, (n, 0)) for p, n in zip(prompts, padding, strict=True)]
        )
        self._start = 0
        self.answers: list[list[int]] = [[] for _ in prompts]

    @property
    def ended(self) -> bool:
        """Whether every answer has come to its end."""
        return all(map(self._is_whole, self.answers))

    def _is_whole(self, answer: Sequence[int]) -> bool:
        return not self._base.end_tokens.isdisjoint(answer[-1:])

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Return what follows each sequence, [sequences, vocabulary]."""
        base, rows = self._base, self._ids.shape[1]
        columns = torch.arange(self._start, self._start + rows, device=base.device)
        output = base.model(
            self._ids.to(base.device),
            position_ids=(columns - self._padding).clamp(min=0),
            attend=self._attend,
            **rows_kept(base.layers, rows, self._dropped),
            logits_to_keep=1,
        )
        self._start += rows
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def append(self, tokens: Sequence[int]) -> None:
        """Add a token to each sequence; answers that have ended stay as they are."""
        for answer, token in zip(self.answers, tokens, strict=True):
            if not self._is_whole(answer):
                answer.append(token)
        self._ids = torch.tensor(tokens)[:, None]


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
