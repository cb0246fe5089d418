"""Instruction following: whether answers do what prompts ask, by IFEval's own strict checks.

Prompts are a JSON-lines file (`prompt`, `instruction_id_list`, `kwargs`; Zhou et al., arXiv
2311.07911); the checks are lm-evaluation-harness's. Two kinds of them split sentences and need
NLTK's `punkt_tab` data: where that cannot be had, prompts with such an instruction are left out and
counted, never judged. Imports lm_eval at once, so it is imported late.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# It tries to download data, and tells of it whether that worked or not.
with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
    from lm_eval.tasks.ifeval import instructions_registry, utils

import langdetect
import nltk

from pruning.calibration import calibration_source, json_records
from pruning.evidence import EvidenceError, Following, clustered, mean_and_error

SPLITTING = frozenset({"length_constraints:number_sentences", "change_case:capital_word_frequency"})
"""The kinds that need NLTK's data."""

logging.getLogger(utils.instructions_registry.instructions.__name__).setLevel(logging.CRITICAL)
langdetect.DetectorFactory.seed = 0  # it draws at random otherwise


@dataclass(frozen=True, slots=True)
class Instructed:
    """Prompts whose instructions can be checked here."""

    source: str
    """The file's name and the hash of its content."""
    prompts: tuple[Any, ...]
    """The harness's `InputExample`s."""
    left_out: int
    """Prompts with an instruction that cannot be checked here."""


def read_instructed(path: Path, most: int) -> Instructed:
    """Return `most` prompts of a file at an even stride (or all), less those that cannot be judged.

    Raises:
        CalibrationError: the file is not readable JSON lines.
        EvidenceError: a line holds something else, or no prompt can be judged.
    """
    records = json_records(path)
    count = min(most, len(records))
    chosen = [index * len(records) // count for index in range(count)]
    found = [_prompt(path, index + 1, records[index]) for index in chosen]
    unknown = frozenset() if _splits() else SPLITTING
    kept = tuple(each for each in found if unknown.isdisjoint(each.instruction_id_list))
    if not kept:
        raise EvidenceError(
            f"{path} holds no prompt that can be judged here; fetch NLTK's data with "
            "`python -m nltk.downloader punkt_tab`"
        )
    return Instructed(calibration_source(str(path)), kept, len(found) - len(kept))


def followed(instructed: Instructed, answers: Sequence[str], dropped: int) -> Following:
    """Return how many instructions the answers follow, one answer a prompt.

    Raises:
        EvidenceError: an instruction's arguments are not what its check takes.
    """
    judged = [_judged(p, a) for p, a in zip(instructed.prompts, answers, strict=True)]
    sizes = [len(each) for each in judged]
    prompt_accuracy, prompt_error = mean_and_error([all(each) for each in judged])
    accuracy, error = clustered([sum(each) for each in judged], sizes)
    return Following(
        source=instructed.source,
        dropped=dropped,
        prompts=len(judged),
        left_out=instructed.left_out,
        instructions=sum(sizes),
        prompt_accuracy=prompt_accuracy,
        prompt_error=prompt_error,
        instruction_accuracy=accuracy,
        instruction_error=error,
    )


def _judged(prompt: Any, answer: str) -> list[bool]:
    try:
        found = utils.test_instruction_following_strict(prompt, answer)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise EvidenceError(
            f"the instructions of the prompt {prompt.prompt!r:.60} cannot be checked: {error}"
        ) from error
    return list(found.follow_instruction_list)


def _splits() -> bool:
    """Return whether NLTK can split sentences."""
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def _prompt(path: Path, line: int, record: Any) -> Any:
    match record:
        case {"prompt": str(prompt), "instruction_id_list": list(kinds), "kwargs": list(kwargs)}:
            known = all(kind in instructions_registry.INSTRUCTION_DICT for kind in kinds)
            if kinds and known and [type(each) for each in kwargs] == [dict] * len(kinds):
                return utils.InputExample(line, kinds, prompt, kwargs)
    raise EvidenceError(
        f"{path}, line {line}: it needs 'prompt', 'instruction_id_list' with kinds that IFEval "
        "knows, and 'kwargs', an object for each"
    )
