"""Multiple choice: questions of a JSON-lines file, and which choices a variant finds most probable.

A choice's score is log P(" " + choice | prompt) over its number of characters, as
lm-evaluation-harness's `acc_norm`. A file whose prompts differ and share one continuation
(WinoGrande) is scored by log P(" " + continuation | prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruning.calibration import Progress, calibration_source, json_records, silent
from pruning.evidence import EvidenceError
from pruning.likelihood import encoded, likelihoods
from pruning.loading import BaseModel
from pruning.targets import NO_SUBLAYERS, Sublayers

DELIMITER = " "
"""Between a prompt and a choice."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is scored: one continuation behind one context for each choice."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


@dataclass(frozen=True, slots=True)
class Questions:
    """A file of them, or a sample of it at an even stride."""

    task: str
    """The file's name without its ending."""
    source: str
    """Its name and the hash of its content."""
    items: tuple[Question, ...]


def read_questions(path: Path, most: int) -> Questions:
    """Return `most` questions of a JSON-lines file at an even stride, or all if there are fewer.

    Each line has `prompt`, `choices` and `gold` (counted from 0), or `prompts`, `continuation` and
    `gold`.

    Raises:
        CalibrationError: the file is not readable JSON lines.
        EvidenceError: a line holds something else.
    """
    records = json_records(path)
    count = min(most, len(records))
    chosen = [index * len(records) // count for index in range(count)]
    items = tuple(_question(path, index + 1, records[index]) for index in chosen)
    return Questions(path.stem, calibration_source(str(path)), items)


def chosen_by(
    base: BaseModel,
    questions: Questions,
    dropped: Sublayers = NO_SUBLAYERS,
    progress: Progress = silent,
    what: str = "multiple choice",
) -> list[int]:
    """Return which choice the variant that drops these layers takes, for each question.

    Raises:
        EvidenceError: a question is empty or longer than the model's context.
    """
    pairs = [
        encoded(base.tokenizer, context, DELIMITER + continuation)
        for item in questions.items
        for context, continuation in zip(item.contexts, item.continuations, strict=True)
    ]
    found = iter(likelihoods(base, pairs, dropped, progress, what))
    return [
        _best([next(found).total / len(text) for text in item.continuations])
        for item in questions.items
    ]


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _question(path: Path, line: int, record: Any) -> Question:
    if isinstance(record, dict):
        match record:
            case {"prompts": list(prompts), "continuation": str(text), "gold": int(gold)}:
                found = Question(tuple(prompts), (text,) * len(prompts), gold)
            case {"prompt": str(prompt), "choices": list(choices), "gold": int(gold)}:
                found = Question((prompt,) * len(choices), tuple(choices), gold)
            case _:
                raise _foreign(path, line)
        texts = (*found.contexts, *found.continuations)
        if all(isinstance(text, str) and text.strip() for text in texts) and (
            0 <= found.gold < len(found.contexts)
        ):
            return found
    raise _foreign(path, line)


def _foreign(path: Path, line: int) -> EvidenceError:
    return EvidenceError(
        f"{path}, line {line}: a question needs 'prompt', 'choices' and 'gold', or 'prompts', "
        "'continuation' and 'gold': texts that are not empty, and gold the right one's index from 0"
    )
