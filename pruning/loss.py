"""The loss of distillation: KL(full || pruned) over the vocabulary, and its gradient.

Logits of all tokens of a batch do not fit in memory (16,384 tokens of a vocabulary of 49,152 are 3
GB, several times over), and autograd would keep them. So they exist for some tokens at a time, and
the gradient is written out. With z the pruned model's logits, p and q the two distributions::

    KL = sum p (log p - log q)            dKL/dz = q - p

and from there back through the head to what enters it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pruning.families import LogitForm, logit_form
from pruning.loading import BaseModel

_LOGITS = {"cpu": 6 << 20, "cuda": 192 << 20}
"""Logits of one model that exist at one time: 25 MB on a CPU, 800 MB on a GPU, five times over."""


class DivergenceLoss:
    """Weighted KL(full || pruned) of tokens, given what the two models' heads see."""

    def __init__(self, base: BaseModel) -> None:
        self._head: nn.Module = base.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._form: LogitForm = logit_form(base.model.config)
        logits = _LOGITS.get(base.device.type, _LOGITS["cpu"])
        self._rows = max(1, logits // int(base.model.config.get_text_config().vocab_size))

    def gradient(self, full: Tensor, pruned: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the tokens' KL, a float32 scalar on the device, and its
        gradient by `pruned`.

        Args:
            full, pruned: [tokens, width], what the heads see; neither needs gradients.
            weights: [tokens], float32.
        """
        total = torch.zeros((), device=full.device)
        gradients = torch.empty_like(pruned)
        for start in range(0, len(full), self._rows):
            rows = slice(start, start + self._rows)
            kl, gradients[rows] = self._some(full[rows], pruned[rows].detach(), weights[rows])
            total += kl
        return total, gradients

    def _some(self, full: Tensor, pruned: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = self._logits(self._head(full))
        with torch.enable_grad():
            seen = pruned.requires_grad_()
            products = self._head(seen)
        with torch.no_grad():
            logits = self._logits(products)
            kl, slope = _divergence(target, logits)
            slope *= weights[:, None]
            self._through_form(slope, logits)
        (gradient,) = torch.autograd.grad(products, seen, slope.to(products.dtype))
        return (kl * weights).sum(), gradient

    def _logits(self, products: Tensor) -> Tensor:
        """Return what the family makes of the head's products, [rows, vocabulary] in float32."""
        logits = products.float()
        if self._form.divisor != 1.0:
            logits = logits / self._form.divisor
        if (cap := self._form.softcap) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def _through_form(self, slope: Tensor, logits: Tensor) -> None:
        """Turn the gradient by logits into that by the head's products, in place."""
        if (cap := self._form.softcap) is not None:
            slope *= 1 - (logits / cap).square()
        if self._form.divisor != 1.0:
            slope /= self._form.divisor


def _divergence(full: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's KL, [rows], and its gradient by the pruned logits, [rows, vocabulary]."""
    norm, pruned_norm = full.logsumexp(-1), pruned.logsumexp(-1)
    p = (full - norm[:, None]).exp_()
    kl = (p * (full - pruned)).sum(-1) - norm + pruned_norm
    return kl, (pruned - pruned_norm[:, None]).exp_().sub_(p)
