"""The runner: one forward pass a step, and the tokens that come out of it.

Owns everything on the device: the wrapped model, the page pool, the attention backend. Used from
the engine thread alone. Knows nothing of queues or streams.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.loading import BaseModel
from server.engine.attention import AttentionBackend
from server.engine.batch import Batch
from server.engine.request import TokenLogprobs
from server.engine.sampling import generated_logprobs, prompt_logprobs, sample


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step computed."""

    tokens: tuple[int, ...]
    """One for each of the batch's `sampled`."""
    logprobs: tuple[TokenLogprobs | None, ...]
    """One for each of the batch's `sampled`."""
    prompt_logprobs: tuple[TokenLogprobs, ...]
    """One for each of the batch's `scored`."""


class Runner:
    """Runs batches on one model."""

    def __init__(self, base: BaseModel, pool: Tensor, attend: AttentionBackend) -> None:
        """pool is [pages, page_elements], the memory that `attend` works on."""
        self._model = base.model
        self._pool = pool
        self._attend = attend

    @property
    def pool_bytes(self) -> int:
        return self._pool.numel() * self._pool.element_size()

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult:
        """Compute a batch: keys and values into their pages, and its new tokens."""
        self._attend.prepare(batch)
        logits = self._logits(batch)
        count = len(batch.sampled)
        tokens = sample(logits[:count], batch.sampling)
        return StepResult(
            tuple(tokens),
            tuple(generated_logprobs(logits[:count], batch.sampling, tokens)),
            tuple(prompt_logprobs(logits[count:], batch.scored)),
        )

    def _logits(self, batch: Batch) -> Tensor:
        """Return the logits of the rows that need them, [logit rows, vocabulary], in float32."""
        device = self._pool.device
        output = self._model(
            torch.as_tensor(batch.token_ids, device=device)[None],
            position_ids=torch.as_tensor(batch.positions, device=device)[None],
            attend=self._attend,
            attending_rows=batch.attending_rows,
            logits_to_keep=torch.as_tensor(batch.logit_rows, device=device),
        )
        return output.logits[0].float()  # type: ignore[no-any-return]
