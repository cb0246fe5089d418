"""Corpus: what substitutes are fitted and distilled on, by source, each with a part held out.

    self                text that the full model writes from nothing
    a text file         all of it, in windows
    a file of prompts   conversations: the full model writes the answers, which alone are predicted
    prompts of its own  the same, and the model writes the prompts as well

Nothing in the held-out rows is trained on: one in eight of each source, at an even stride, and at
most 16. What the model writes takes long, so it is kept in a folder under the name of all that it
depends on. Knows tokens and where they came from; knows nothing of losses or plans.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pruning.calibration import (
    SELF,
    CalibrationError,
    Progress,
    calibration_source,
    sample_tokens,
    silent,
    whole_file,
)
from pruning.conversation import (
    Conversation,
    chat_prompts,
    prompts_in,
    rows_in_cache,
    sampled,
    written_prompts,
)
from pruning.families import context_limit
from pruning.files import write_atomically
from pruning.loading import BaseModel
from pruning.plan import digest, dtype_name

logger = logging.getLogger(__name__)

SELF_CHAT = "self-chat"
"""The source of conversations that the model writes both sides of."""
_HELD_OUT = 8
"""One in so many rows of each source is held out, ..."""
_MOST_HELD_OUT = 16
"""... and no more than that."""
_TOGETHER = {"cpu": 32, "cuda": 256}
"""Sequences that the model writes together at most, if there is room for their keys and values."""
_APART = int.from_bytes(b"heal")
"""Keeps a seed's text apart from the calibration text that plans are made with."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Sequences of one length; shorter ones are padded at the end. All on the CPU."""

    token_ids: Tensor
    """[rows, length], int64."""
    starts: Tensor
    """[rows], int64: the first position whose token is predicted, at least 1."""
    ends: Tensor
    """[rows], int64: where the padding begins, above the start."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, chosen: Tensor | slice) -> Rows:
        return Rows(self.token_ids[chosen], self.starts[chosen], self.ends[chosen])

    def split(self, size: int) -> Iterator[Rows]:
        """Yield the rows in order, `size` at a time."""
        for first in range(0, len(self), size):
            yield self[first : first + size]

    @property
    def real(self) -> Tensor:
        """The places of all tokens but padding, in the flat [rows * length]."""
        return self._between(torch.zeros_like(self.ends), self.ends)

    @property
    def predicting(self) -> Tensor:
        """The places, in the flat [rows * length], whose next token is predicted."""
        return self._between(self.starts - 1, self.ends - 1)

    @property
    def predicted(self) -> int:
        """How many tokens are predicted."""
        return int((self.ends - self.starts).sum())

    @property
    def fingerprint(self) -> str:
        """`sha256:...` over the tokens and what of them is predicted."""
        hashed = hashlib.sha256(f"{tuple(self.token_ids.shape)}\n".encode())
        for part in (self.token_ids, self.starts, self.ends):
            hashed.update(part.contiguous().numpy().astype("<i8").tobytes())
        return f"sha256:{hashed.hexdigest()}"

    def _between(self, starts: Tensor, ends: Tensor) -> Tensor:
        places = torch.arange(self.token_ids.shape[1])
        inside = (places >= starts[:, None]) & (places < ends[:, None])
        return inside.flatten().nonzero().flatten()


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The rows of one source."""

    name: str
    """As the user gave it."""
    source: str
    """For a file: its name and the hash of its content."""
    training: Rows
    held_out: Rows

    @property
    def fingerprint(self) -> str:
        """`sha256:...` over both parts."""
        parts = {"training": self.training.fingerprint, "held_out": self.held_out.fingerprint}
        return f"sha256:{digest(parts)}"


@dataclass(frozen=True, slots=True)
class CorpusRequest:
    """What to make a corpus of."""

    written: int
    """Tokens that the model writes from nothing; 0 for none."""
    texts: tuple[str, ...]
    prompts: tuple[str, ...]
    """Files of chat prompts; `self` for prompts that the model writes."""
    answers: int
    """How many prompts of each file are answered, at an even stride, at most; and how many the
    model writes."""
    length: int
    """Tokens of a row; an answer has at most half of them."""
    seed: int


def make_corpus(
    base: BaseModel, request: CorpusRequest, folder: Path, progress: Progress = silent
) -> tuple[Source, ...]:
    """Return the sources that a request names, those the model writes from `folder` if they are
    there.

    Raises:
        CalibrationError: there is no source, one is not usable, or one is too small to hold out a
            part of it.
    """
    limit = context_limit(base.model.config)
    if not 4 <= request.length <= limit:
        raise CalibrationError(
            f"--length must be 4 to {limit} tokens, the context of {base.name}, not "
            f"{request.length}"
        )
    if request.answers < 1:
        raise CalibrationError(f"--answers must be at least 1, not {request.answers}")
    if not 0 <= request.seed < 1 << 63:
        raise CalibrationError(f"seed must be 0 to 2**63 - 1, not {request.seed}")
    maker = _Maker(base, request, folder, progress)
    names = [*request.texts, *request.prompts]
    if len(set(names)) < len(names):
        raise CalibrationError(f"each file can be given once, not {names}")
    found = [] if not request.written else [_split(SELF, SELF, maker.written())]
    found += [_split(path, calibration_source(path), maker.text(path)) for path in request.texts]
    found += [
        _split(SELF_CHAT if path == SELF else path, _prompts_source(path), maker.answers(path))
        for path in request.prompts
    ]
    if not found:
        raise CalibrationError("name something to train on: --written, --text or --prompts")
    return tuple(found)


def _prompts_source(path: str) -> str:
    """Return what a file of prompts is named by, `self` included."""
    return SELF_CHAT if path == SELF else calibration_source(path)


def _split(name: str, source: str, rows: Rows) -> Source:
    """Hold out a part of the rows."""
    if len(rows) < 2:
        raise CalibrationError(
            f"{name!r} gives {len(rows)} sequences, which leaves none to judge by; give more text, "
            "or lower --length"
        )
    count = min(_MOST_HELD_OUT, max(1, len(rows) // _HELD_OUT))
    held_out = torch.zeros(len(rows), dtype=torch.bool)
    held_out[[index * len(rows) // count + len(rows) // count // 2 for index in range(count)]] = (
        True
    )
    return Source(name, source, rows[~held_out], rows[held_out])


class _Maker:
    """Makes the rows of each kind of source."""

    def __init__(
        self, base: BaseModel, request: CorpusRequest, folder: Path, progress: Progress
    ) -> None:
        self._base = base
        self._request = request
        self._folder = folder
        self._progress = progress
        most = _TOGETHER.get(base.device.type, _TOGETHER["cpu"])
        self._together = min(most, rows_in_cache(base, request.length))
        self._seed = request.seed ^ _APART

    def written(self) -> Rows:
        samples = self._request.written // self._request.length
        if samples < 2:
            raise CalibrationError(
                f"--written {self._request.written} is less than two sequences of "
                f"{self._request.length} tokens; raise it, or give 0 for none"
            )
        return self._kept({"written": samples}, lambda: self._write(samples))

    def text(self, path: str) -> Rows:
        return _whole(whole_file(path, self._base, self._request.length))

    def answers(self, path: str) -> Rows:
        question = {"prompts": _prompts_source(path), "answers": self._request.answers}
        return self._kept(question, lambda: self._answer(path))

    def _write(self, samples: int) -> Rows:
        table = sample_tokens(
            self._base,
            samples,
            self._request.length,
            self._seed,
            self._progress,
            together=self._together,
        )
        return _whole(table)

    def _answer(self, path: str) -> Rows:
        """Let the full model answer prompts that leave half of a row for it."""
        most = self._request.length // 2
        prompts = self._prompts(path, most)
        fitting = sorted((p for p in prompts if len(p) <= self._request.length - most), key=len)
        if len(fitting) < len(prompts):
            logger.warning(
                "%d of %d prompts of %s are longer than %d tokens and are left out; a greater "
                "--length takes them",
                len(prompts) - len(fitting),
                len(prompts),
                path,
                self._request.length - most,
            )
        seeds = range(self._seed, self._seed + len(fitting))
        return self._rows(sampled(self._base, fitting, most, seeds, progress=self._progress))

    def _prompts(self, path: str, most: int) -> list[Tensor]:
        """Return prompts' tokens; the model's own have about an eighth of a row at most."""
        if path != SELF:
            count = min(prompts_in(path), self._request.answers)
            return chat_prompts(path, self._base, count)
        seed = self._seed + self._request.answers  # answers have those before it
        return written_prompts(
            self._base, self._request.answers, most // 4, seed, progress=self._progress
        )

    def _rows(self, conversations: Sequence[Conversation]) -> Rows:
        filler = int(next(iter(sorted(self._base.end_tokens)), 0))
        table = torch.full((len(conversations), self._request.length), filler)
        for row, each in enumerate(conversations):
            tokens = torch.cat([each.prompt, each.answer])
            table[row, : len(tokens)] = tokens
        starts = torch.tensor([len(each.prompt) for each in conversations], dtype=torch.int64)
        lengths = torch.tensor([len(each.answer) for each in conversations], dtype=torch.int64)
        return Rows(table, starts, starts + lengths)

    def _kept(self, question: dict[str, Any], make: Callable[[], Rows]) -> Rows:
        """Return rows made before for the same question, or make and keep them."""
        asked = {
            **question,
            "model": self._base.fingerprint,
            "dtype": dtype_name(self._base),
            "device": self._base.device.type,
            "length": self._request.length,
            "seed": self._request.seed,
        }
        path = self._folder / f"{digest(asked)[:16]}.rows"
        try:
            return Rows(**load(path.read_bytes()))
        except FileNotFoundError:
            pass
        except (OSError, SafetensorError, TypeError) as error:
            logger.warning("writing text again, since %s is not readable: %s", path, error)
        rows = make()
        tensors = {"token_ids": rows.token_ids, "starts": rows.starts, "ends": rows.ends}
        try:
            write_atomically(path, save(tensors))
        except OSError as error:
            raise CalibrationError(f"cannot write {path}: {error.strerror}") from error
        return rows


def _whole(token_ids: Tensor) -> Rows:
    """Return rows without padding in which every token but the first is predicted."""
    rows, length = token_ids.shape
    return Rows(token_ids, torch.ones(rows, dtype=torch.int64), torch.full((rows,), length))
