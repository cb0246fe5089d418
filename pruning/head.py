"""Head: from what the last layer leaves to log probabilities of the next token.

Logits take most of the memory there is: a row has as many as the vocabulary. So they exist for
as many rows at one time as `rows` says, and callers go through theirs in such slices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pruning.families import logit_form
from pruning.loading import BaseModel

_LOGITS = {"cpu": 6 << 20, "cuda": 64 << 20}
"""Logits of one model that exist at one time: 25 MB on a CPU, a few times that with what is made
of them."""


class Head:
    """A base model's output embeddings, in the form of its family."""

    def __init__(self, base: BaseModel) -> None:
        self._embeddings = base.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._form = logit_form(base.model.config)
        most = _LOGITS.get(base.device.type, _LOGITS["cpu"])
        self._rows = max(1, most // int(base.model.config.get_text_config().vocab_size))

    def slices(self, count: int) -> Iterator[slice]:
        """Yield slices of `count` rows whose logits may exist at one time."""
        for start in range(0, count, self._rows):
            yield slice(start, start + self._rows)

    def logprobs(self, last: Tensor) -> Tensor:
        """Return [rows, vocabulary] in float32 of what the head sees, [rows, width]."""
        logits = self._embeddings(last).float() / self._form.divisor
        if (cap := self._form.softcap) is not None:
            logits = cap * torch.tanh(logits / cap)
        return torch.log_softmax(logits, dim=-1)
