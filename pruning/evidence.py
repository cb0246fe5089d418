"""Evidence: what an evaluation found, as plain data and as a JSON file.

It holds what it takes to measure again: seeds, versions, and fingerprints of the model, the plan,
its substitutes and the very tokens. Knows the format; knows nothing of how things are measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from pruning.files import write_atomically
from pruning.plan import Versions

MAX_EVIDENCE_BYTES = 8 << 20


class EvidenceError(ValueError):
    """Something cannot be measured as asked, or evidence cannot be read or written."""


@dataclass(frozen=True, slots=True)
class Amount:
    """How much is measured."""

    windows: int = 24
    length: int = 512
    """Tokens of a window of text."""
    prompts: int = 16
    answer: int = 96
    """Tokens of an answer at most."""
    seed: int = 0
    items: int = 500
    """Of each multiple-choice file, at most."""
    instructions: int = 541
    """Prompts with checkable instructions, at most."""
    instructed_answer: int = 512
    """Tokens of an answer to one of these at most."""
    needles: int = 8
    """Needles for each length and position."""


@dataclass(frozen=True, slots=True)
class Domain:
    """What variants are compared on."""

    name: str
    source: str
    """The file's name and the hash of its content."""
    samples: int
    tokens: int
    """Predicted ones."""
    fingerprint: str
    """`sha256:...` over the very tokens, those that the full model wrote included."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One depth on one domain, beside the full model."""

    domain: str
    dropped: int
    perplexity: float
    perplexity_ratio: float
    """Over the full model's."""
    perplexity_ratio_error: float
    """Standard error of that ratio, over samples (tokens of one sample are not independent)."""
    kl: float
    """KL(full || variant) in nats, mean over tokens."""
    kl_error: float
    """Standard error of that mean, over samples."""
    kl_p50: float
    kl_p90: float
    kl_p99: float
    """Quantiles over tokens."""
    agreement: float
    agreement_error: float
    """Standard error, over samples."""
    agreement_p10: float
    """The tenth percentile of the samples' own agreement."""


@dataclass(frozen=True, slots=True)
class Health:
    """The answers that one depth wrote freely."""

    dropped: int
    answers: int
    mean_length: float
    """Tokens."""
    mean_length_error: float
    repetition: float
    """Share of the four-token runs that the same answer held before, mean over answers."""
    repetition_error: float
    finished: float
    """Share of the answers that ended by themselves, and not by length."""
    finished_error: float


@dataclass(frozen=True, slots=True)
class Choices:
    """One depth on one file of multiple-choice questions."""

    task: str
    source: str
    dropped: int
    items: int
    accuracy: float
    """Of the choice with the most log P for each of its characters."""
    error: float
    """Standard error of the accuracy."""
    unchanged: float
    """Share of the questions where the full model chooses the same."""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One depth on one of lm-evaluation-harness's own tasks."""

    task: str
    metric: str
    dropped: int
    items: int
    value: float
    error: float | None
    """Standard error, where the harness gives one."""


@dataclass(frozen=True, slots=True)
class Following:
    """Whether one depth's answers do what the prompts ask, by IFEval's strict checks."""

    source: str
    dropped: int
    prompts: int
    """Judged ones."""
    left_out: int
    """Prompts with an instruction that cannot be checked here; they count in nothing."""
    instructions: int
    prompt_accuracy: float
    """Share of the prompts all of whose instructions are followed."""
    prompt_error: float
    instruction_accuracy: float
    instruction_error: float
    """Standard error over prompts: instructions of one prompt are not independent."""


@dataclass(frozen=True, slots=True)
class Retrieval:
    """How well one depth finds a sentence in a long text."""

    dropped: int
    length: int
    """Tokens of the prompt, the question included."""
    depth: int
    """Where the sentence stands: 0 is the beginning of the text and 100 its end."""
    trials: int
    found: float
    """Share of the trials where greedy decoding would write the whole value."""
    found_error: float
    logprob: float
    """log P of a token of the value, in nats, mean over its tokens and trials."""
    logprob_error: float
    """Standard error over trials."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one depth answered."""

    dropped: int
    text: str
    """Cut where it is very long."""
    finished: bool


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and each depth's answer to it."""

    prompt: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Everything that was measured, and what it takes to measure it again."""

    format: Literal["attndrop-evidence"] = "attndrop-evidence"
    version: Literal[1] = 1
    model: str
    fingerprint: str
    layers: int
    kv_bytes: int
    """Of one token in one layer, keys and values together, in the model's dtype."""
    dtype: str
    device: str
    plan: str
    strategy: str
    substitutes: str | None
    """The fingerprint of the plan's substitutes."""
    substitutes_kind: str | None
    amount: Amount
    created: str
    versions: Versions
    harness: str | None
    """lm-evaluation-harness's version, where it took part."""
    domains: tuple[Domain, ...]
    figures: tuple[Figures, ...]
    health: tuple[Health, ...]
    choices: tuple[Choices, ...]
    tasks: tuple[TaskScore, ...]
    following: tuple[Following, ...]
    retrieval: tuple[Retrieval, ...]
    examples: tuple[Example, ...]
    attention_dropped: Mapping[int, int] | None = None
    """How many layers lose their attention at each depth, where it is not one at each step."""


_EVALUATION = TypeAdapter(Evaluation)


def write_evidence(path: Path, evaluation: Evaluation) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        EvidenceError: it cannot be written.
    """
    text = json.dumps(asdict(evaluation), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        write_atomically(path, (text + "\n").encode())
    except OSError as error:
        raise EvidenceError(
            f"cannot write {path}: {error.strerror}; choose another place"
        ) from error


def read_evidence(path: Path) -> Evaluation:
    """Read a JSON file that `attndrop evaluate` wrote.

    Raises:
        EvidenceError: not readable, larger than 8 MiB, or something else; the sentence names it.
    """
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MAX_EVIDENCE_BYTES else b""
    except OSError as error:
        raise EvidenceError(
            f"cannot read evidence {path}: {error.strerror}; write some with `attndrop evaluate "
            "--json FILE`"
        ) from error
    if size > MAX_EVIDENCE_BYTES:
        raise EvidenceError(
            f"evidence {path} has {size} bytes; at most {MAX_EVIDENCE_BYTES} are read"
        )
    try:
        return _EVALUATION.validate_json(content, strict=True, extra="forbid")
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise EvidenceError(
            f"evidence {path} is not usable: {place or 'file'}: {problem['msg']}; write it again "
            "with this release's `attndrop evaluate --json FILE`"
        ) from error


# Averages.


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, that of a sample; 0 for a single value."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, 0.0
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)


def clustered(sums: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    """Return the mean over all that clusters hold, and its standard error; 0 for a single cluster.

    What stands in one cluster (tokens of a window, instructions of a prompt) is not independent, so
    the error is that of a ratio of two sums over clusters (Cochran, Sampling Techniques, 6.4).

    Args:
        sums: of each cluster's values.
        sizes: how many values each holds.
    """
    clusters, total = len(sums), sum(sizes)
    mean = sum(sums) / total
    if clusters < 2:
        return mean, 0.0
    squares = sum((part - mean * size) ** 2 for part, size in zip(sums, sizes, strict=True))
    return mean, math.sqrt(squares * clusters / (clusters - 1)) / total


def average_choices(rows: Sequence[Choices]) -> tuple[float, float]:
    """Return the mean accuracy over tasks, each with the same weight, and its standard error."""
    errors = math.sqrt(sum(row.error**2 for row in rows))
    return sum(row.accuracy for row in rows) / len(rows), errors / len(rows)
