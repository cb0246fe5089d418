"""Calibration tokens: a file, a data set, or text that the base model writes itself.

A calibration set is a table of token ids and an honest description of where they came from. This
file knows tokenizers and how to sample from the base model; it knows nothing of scores or plans.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pruning.attention import GrowingAttention
from pruning.families import context_limit
from pruning.loading import BaseModel

SELF = "self"
"""The calibration spec for text that the base model writes itself. It needs no data."""

DEFAULT_SAMPLES = 24
DEFAULT_LENGTH = 128
DEFAULT_SEED = 0

MAX_FILE_BYTES = 16 << 20
JSON_LINES_SUFFIXES = frozenset({".jsonl", ".ndjson"})
DATA_SET = "hf:"
_SAMPLING_ROWS = 64
_HELD_OUT = 4
"""One in so many samples of each source is held out."""

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is to do. What follows a
comma in the first says how it stands, and may change."""


class CalibrationError(ValueError):
    """The calibration data cannot be found, read or used."""


def silent(what: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationSet:
    """What importance is measured on."""

    token_ids: Tensor
    """[samples, length], int64, on the CPU."""
    sources: tuple[str, ...]
    """Where the tokens came from, sample i from source i modulo their number; for a file this
    includes a hash of its content."""
    seed: int | None
    """What the sampling was seeded with; None where nothing was random."""

    @property
    def samples(self) -> int:
        return self.token_ids.shape[0]

    @property
    def length(self) -> int:
        return self.token_ids.shape[1]

    @property
    def fingerprint(self) -> str:
        """`sha256:...` over the shape and the token ids."""
        digest = hashlib.sha256(f"{self.samples}x{self.length}\n".encode())
        digest.update(self.token_ids.numpy().astype("<i8").tobytes())
        return f"sha256:{digest.hexdigest()}"

    def split(self) -> tuple[Tensor, Tensor]:
        """Return the token ids to choose by and those to judge by, both [samples, length].

        One in four samples of each source is held out: what was chosen is judged on tokens that
        did not choose it.

        Raises:
            CalibrationError: a source has a single sample.
        """
        if self.samples < 2 * len(self.sources):
            raise CalibrationError(
                f"{self.samples} samples of {len(self.sources)} sources leave nothing to judge by; "
                f"give at least {2 * len(self.sources)}, two for each source"
            )
        held_out = torch.tensor([self._is_held_out(sample) for sample in range(self.samples)])
        return self.token_ids[~held_out], self.token_ids[held_out]

    def _is_held_out(self, sample: int) -> bool:
        source, place = sample % len(self.sources), sample // len(self.sources)
        count = len(range(source, self.samples, len(self.sources)))
        return place == count - 1 if count < _HELD_OUT else place % _HELD_OUT == _HELD_OUT - 1


def mixture(
    specs: Sequence[str],
    base: BaseModel,
    *,
    samples: int = DEFAULT_SAMPLES,
    length: int = DEFAULT_LENGTH,
    seed: int = DEFAULT_SEED,
    progress: Progress = silent,
) -> CalibrationSet:
    """Return `samples` calibration sequences, as evenly as can be from several sources.

    Args:
        specs: as in `calibrate`, each once.
        seed: of the text that the model writes.

    Raises:
        CalibrationError: as in `calibrate`; a spec is given twice, or there are too few samples.
    """
    if not specs or len(set(specs)) < len(specs):
        raise CalibrationError(f"calibration sources must be different ones, not {list(specs)}")
    if samples < len(specs):
        raise CalibrationError(f"{samples} samples are too few for {len(specs)} sources")
    parts = [
        calibrate(
            spec,
            base,
            samples=len(range(index, samples, len(specs))),
            length=length,
            seed=seed,
            progress=progress,
        )
        for index, spec in enumerate(specs)
    ]
    token_ids = torch.empty(samples, length, dtype=torch.int64)
    for index, part in enumerate(parts):
        token_ids[index :: len(parts)] = part.token_ids
    sources = tuple(source for part in parts for source in part.sources)
    return CalibrationSet(token_ids, sources, seed if SELF in specs else None)


def calibrate(
    spec: str,
    base: BaseModel,
    *,
    samples: int = DEFAULT_SAMPLES,
    length: int = DEFAULT_LENGTH,
    seed: int = DEFAULT_SEED,
    progress: Progress = silent,
) -> CalibrationSet:
    """Return `samples` calibration sequences of `length` tokens.

    Args:
        spec: `self`; `hf:NAME[:CONFIG][:SPLIT][:COLUMN]`, a Hugging Face data set; or the path of
            a UTF-8 text file or of a JSON-lines file (.jsonl, .ndjson).
        seed: of the text that the model writes; not used for files and data sets.

    Raises:
        CalibrationError: the spec names nothing usable, or holds too little text.
    """
    _check_shape(base, samples, length, seed)
    source = calibration_source(spec)
    if spec == SELF:
        return CalibrationSet(sample_tokens(base, samples, length, seed, progress), (source,), seed)
    prefix = _text_prefix(base)
    wanted = samples * (length - len(prefix))
    if spec.startswith(DATA_SET):
        ids = list(islice(_tokens(_data_set_texts(spec, base.tokenizer), base.tokenizer), wanted))
    else:
        ids = list(_tokens(_file_texts(Path(spec), base.tokenizer), base.tokenizer))
    if len(ids) < wanted:
        raise CalibrationError(
            f"calibration data {spec!r} holds {len(ids)} tokens, but {samples} samples of {length} "
            f"need {wanted}; give more text, or lower --samples or --length"
        )
    return CalibrationSet(_windows(ids, prefix, samples, length), (source,), None)


def whole_file(path: str, base: BaseModel, length: int) -> Tensor:
    """Return [samples, length]: as many sequences as a text or JSON-lines file fills.

    Raises:
        CalibrationError: it is not usable, or does not fill a single one.
    """
    _check_shape(base, 1, length, 0)
    prefix = _text_prefix(base)
    ids = list(_tokens(_file_texts(Path(path), base.tokenizer), base.tokenizer))
    if not (samples := len(ids) // (length - len(prefix))):
        raise CalibrationError(
            f"{path!r} holds {len(ids)} tokens, less than one sequence of {length}; give more "
            "text, or lower --length"
        )
    return _windows(ids, prefix, samples, length)


def calibration_source(spec: str) -> str:
    """Return the description of `spec` that is recorded, and which identifies its content.

    Raises:
        CalibrationError: the spec names no file, or a malformed data set.
    """
    if spec == SELF:
        return SELF
    if spec.startswith(DATA_SET):
        name, config, split, column = _data_set_parts(spec)
        return f"{DATA_SET}{name}:{config or ''}:{split}:{column or ''}"
    path = Path(spec)
    return f"{path.name} sha256:{hashlib.sha256(_read(path)).hexdigest()}"


def _check_shape(base: BaseModel, samples: int, length: int, seed: int) -> None:
    limit = context_limit(base.model.config)
    if samples < 1:
        raise CalibrationError(f"samples must be at least 1, not {samples}")
    if not 2 <= length <= limit:
        raise CalibrationError(
            f"length must be 2 to {limit} tokens, the context of {base.name}, not {length}"
        )
    if not 0 <= seed < 1 << 63:
        raise CalibrationError(f"seed must be 0 to 2**63 - 1, not {seed}")


# Text that the base model writes.


def sample_tokens(
    base: BaseModel,
    samples: int,
    length: int,
    seed: int,
    progress: Progress,
    *,
    together: int = _SAMPLING_ROWS,
) -> Tensor:
    """Return [samples, length] token ids that the base model writes at temperature 1.

    Every sequence starts with BOS (EOS where there is none). An EOS ends a document, not the
    sequence: writing goes on behind it, as in the packed text that models are trained on. So many
    sequences are written `together`, which decides which random numbers each of them gets.
    """
    generator = torch.Generator().manual_seed(seed)
    total = samples * length
    finished: list[Tensor] = []
    for first in range(0, samples, together):
        rows = min(together, samples - first)
        ids = torch.full((rows, 1), first_token(base), dtype=torch.int64)
        columns = [ids]
        for column in _continuation(base, ids, length - 1, generator):
            columns.append(column)
            progress("writing calibration text", first * length + rows * len(columns), total)
        finished.append(torch.cat(columns, dim=1))
    return torch.cat(finished)


def first_token(base: BaseModel) -> int:
    for token in (base.tokenizer.bos_token_id, base.tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise CalibrationError(
        f"the tokenizer of {base.name} has neither a BOS nor an EOS token to start writing from; "
        "give a text file as calibration data instead"
    )


@torch.inference_mode()
def _continuation(
    base: BaseModel, ids: Tensor, steps: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield `steps` columns [rows, 1] of sampled tokens that follow `ids` [rows, 1]."""
    attend = GrowingAttention()
    for position in range(steps):
        logits = base.model(
            ids.to(base.device),
            position_ids=torch.full((1, 1), position, device=base.device),
            attend=attend,
            logits_to_keep=1,
        ).logits[:, -1]
        ids = draw(logits, generator)
        yield ids


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token per row [rows, vocabulary]; returns [rows, 1] on the CPU.

    One random number a row, drawn on the CPU, so that a seed means the same on every device.
    """
    return drawn_at(logits, torch.rand(len(logits), 1, generator=generator, dtype=torch.float64))


def drawn_at(logits: Tensor, points: Tensor) -> Tensor:
    """Return the token of each row [rows, vocabulary] that a random number [rows, 1] draws.

    By inversion of the cumulative distribution, several times faster than torch.multinomial.
    Returns [rows, 1] on the CPU.
    """
    cumulative = torch.softmax(logits.float(), dim=-1).double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    if not bool(torch.isfinite(total).all()):
        raise CalibrationError(
            f"the base model's logits are not finite in {str(logits.dtype).removeprefix('torch.')};"
            " load it with --dtype bfloat16 or float32"
        )
    chosen = torch.searchsorted(cumulative, points.to(total.device) * total, right=True)
    return chosen.clamp_(max=logits.shape[-1] - 1).cpu()


# Text that is given.


def _text_prefix(base: BaseModel) -> list[int]:
    """Return what the tokenizer puts before a text: often BOS, or nothing."""
    return list(base.tokenizer.encode(""))


def _windows(ids: list[int], prefix: list[int], samples: int, length: int) -> Tensor:
    """Return [samples, length]: windows that start at an even stride over the tokens.

    Every window begins with `prefix`, what the tokenizer puts before a text (often BOS).
    """
    starts = (sample * len(ids) // samples for sample in range(samples))
    return torch.tensor([prefix + ids[start : start + length - len(prefix)] for start in starts])


def _tokens(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """Yield the tokens of the texts, each text followed by EOS, reading texts as needed."""
    eos = tokenizer.eos_token_id
    for text in texts:
        yield from tokenizer.encode(text, add_special_tokens=False, verbose=False)
        if isinstance(eos, int):
            yield eos


def _file_texts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return a text file as one document, or a JSON-lines file as one document a line."""
    if path.suffix.lower() not in JSON_LINES_SUFFIXES:
        return [_file_text(path)]
    return [
        _line_text(path, number, record, tokenizer)
        for number, record in enumerate(json_records(path), start=1)
    ]


def json_records(path: Path) -> list[Any]:
    """Return what each line of a JSON-lines file holds.

    Raises:
        CalibrationError: the file is not readable, too large, or not JSON lines.
    """
    lines = _file_text(path).removesuffix("\n").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep"
            raise CalibrationError(
                f"calibration file {path}, line {number}: it is not JSON ({reason})"
            ) from error
    return records


def _file_text(path: Path) -> str:
    try:
        text = _read(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"calibration file {path} is not UTF-8 (byte {error.start}); convert it first"
        ) from error
    if not text.strip():
        raise CalibrationError(f"calibration file {path} is empty; give one that holds text")
    return text


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MAX_FILE_BYTES else b""
    except FileNotFoundError as error:
        raise CalibrationError(
            f"there is no calibration file {str(path)!r}; give the path of a text or JSON-lines "
            f"file, {SELF!r} for text the model writes itself, or "
            f"'{DATA_SET}NAME[:CONFIG][:SPLIT][:COLUMN]' for a Hugging Face data set"
        ) from error
    except OSError as error:
        raise CalibrationError(
            f"cannot read calibration file {path}: {error.strerror}; give a readable file"
        ) from error
    if size > MAX_FILE_BYTES:
        raise CalibrationError(
            f"calibration file {path} has {size} bytes; at most {MAX_FILE_BYTES} are read, and far "
            "less is needed: give a part of it"
        )
    return content


def _line_text(path: Path, number: int, record: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        text = _record_text(record, tokenizer)
        if text.strip():
            return text
        problem = "its text is empty"
    except CalibrationError as error:
        problem = str(error)
    raise CalibrationError(f"calibration file {path}, line {number}: {problem}")


def _record_text(record: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of one JSON object: its `text`, its `prompt`, or its `messages` rendered."""
    if isinstance(record, dict):
        for field in ("text", "prompt"):
            if isinstance(record.get(field), str):
                return str(record[field])
        if isinstance(record.get("messages"), list):
            return rendered(record["messages"], tokenizer)
    raise CalibrationError("it needs 'text' or 'prompt', a string, or 'messages', a list")


def rendered(
    messages: list[Any], tokenizer: PreTrainedTokenizerBase, *, for_answer: bool = False
) -> str:
    """Return messages as the chat template writes them; `for_answer`, up to where one begins.

    Raises:
        CalibrationError: the template is missing or cannot render them.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=for_answer
            )
        )
    except (ValueError, TypeError, KeyError, AttributeError, jinja2.TemplateError) as error:
        raise CalibrationError(
            f"the chat template cannot render its messages: {_first_line(error)}"
        ) from error


# Hugging Face data sets.


def _data_set_parts(spec: str) -> tuple[str, str | None, str, str | None]:
    """Return name, config, split and column; an empty part means its default."""
    parts = spec.removeprefix(DATA_SET).split(":")
    if not parts[0] or len(parts) > 4:
        raise CalibrationError(
            f"data set {spec!r} is not of the form '{DATA_SET}NAME[:CONFIG][:SPLIT][:COLUMN]'"
        )
    name, config, split, column = parts + [""] * (4 - len(parts))
    return name, config or None, split or "train", column or None


def _data_set_texts(spec: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the documents of a data set from its start, as they are needed."""
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"data set {spec!r} needs the 'datasets' package: run `pip install "
            "'attndrop[datasets]'`, or give a text file"
        ) from error
    name, config, split, column = _data_set_parts(spec)
    try:
        for row in datasets.load_dataset(name, config, split=split, streaming=True):
            yield _column_text(spec, row, column) if column else _record_text(row, tokenizer)
    except CalibrationError as error:
        raise CalibrationError(f"a row of data set {spec!r}: {error}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise CalibrationError(
            f"data set {spec!r} cannot be fetched: {_first_line(error)}; check its name and the "
            "network, or give a text file"
        ) from error


def _column_text(spec: str, row: dict[str, Any], column: str) -> str:
    if isinstance(row.get(column), str):
        return str(row[column])
    texts = sorted(name for name, value in row.items() if isinstance(value, str))
    raise CalibrationError(f"column {column!r} holds no text; columns with text: {texts}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
