"""The gradient of distillation's loss, KL(full || pruned) over the vocabulary at every token.

Logits of all tokens of a batch do not fit in memory (16,384 tokens of a vocabulary of 49,152 are 3
GB, several times over), and autograd would keep them. So they exist for some tokens at a time, and
the gradient is written out. With z the pruned model's logits, p and q the two distributions::

    KL = sum p (log p - log q)            dKL/dz = q - p

and from there back through the head to what enters it. The loss itself is nowhere needed: what
judges training is measured on tokens that are not trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pruning.families import LogitForm, logit_form
from pruning.loading import BaseModel

_LOGITS = {"cpu": 6 << 20, "cuda": 192 << 20}
"""Logits of one model that exist at one time: 25 MB on a CPU, 800 MB on a GPU, three times over."""


class DivergenceGradient:
    """The gradient of a weighted sum of tokens' KL, given what the two models' heads see."""

    def __init__(self, base: BaseModel) -> None:
        self._head: nn.Module = base.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._form: LogitForm = logit_form(base.model.config)
        logits = _LOGITS.get(base.device.type, _LOGITS["cpu"])
        if base.device.type == "cuda":
            # Fused, it reads both models' products twice and writes once.
            self._slope = torch.compile(self._slope, dynamic=True)  # type: ignore[method-assign]
        self._rows = max(1, logits // int(base.model.config.get_text_config().vocab_size))

    def __call__(self, full: Tensor, pruned: Tensor, weights: Tensor) -> Tensor:
        """Return the gradient by `pruned`, [tokens, width].

        Args:
            full, pruned: [tokens, width], what the heads see.
            weights: [tokens], float32: of each token's KL in the sum.
        """
        gradients = torch.empty_like(pruned)
        for start in range(0, len(full), self._rows):
            rows = slice(start, start + self._rows)
            gradients[rows] = self._some(full[rows], pruned[rows].detach())
        return gradients.mul_(weights[:, None])

    def _some(self, full: Tensor, pruned: Tensor) -> Tensor:
        """Return the gradients of each token's own KL."""
        with torch.no_grad():
            wanted = self._head(full)
        with torch.enable_grad():
            seen = pruned.requires_grad_()
            products = self._head(seen)
        with torch.no_grad():
            slope = self._slope(wanted, products)
        (gradient,) = torch.autograd.grad(products, seen, slope)
        return gradient

    def _slope(self, full: Tensor, pruned: Tensor) -> Tensor:
        """Return the gradient by the head's products, given those of both models."""
        p = torch.softmax(self._logits(full), -1, dtype=torch.float32)
        logits = self._logits(pruned)
        slope = torch.softmax(logits, -1, dtype=torch.float32).sub_(p)
        if (cap := self._form.softcap) is not None:
            slope *= 1 - (logits / cap).square()
        if self._form.divisor != 1.0:
            slope /= self._form.divisor
        return slope.to(pruned.dtype)

    def _logits(self, products: Tensor) -> Tensor:
        """Return what the family makes of the head's products, [rows, vocabulary]."""
        if self._form.divisor != 1.0:
            products = products.float() / self._form.divisor
        if (cap := self._form.softcap) is not None:
            products = cap * torch.tanh(products.float() / cap)
        return products
