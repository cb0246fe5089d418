"""Likelihood: how probable a variant finds given continuations of given texts.

Many pairs are scored in batches of like length, padded on the right: attention is causal, so no
token sees the padding behind it. Knows tokens and variants; knows nothing of what is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from pruning.attention import CausalAttention
from pruning.calibration import Progress, silent
from pruning.evidence import EvidenceError
from pruning.families import context_limit
from pruning.head import Head
from pruning.loading import BaseModel
from pruning.sublayers import rows_kept
from pruning.targets import NO_SUBLAYERS, Sublayers

_TOKENS = {"cpu": 2048, "cuda": 1 << 15}
"""Tokens of a batch, padding included."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of a context and of what is scored behind it, at least one each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.context) + len(self.continuation)


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What a variant says of a continuation, token by token."""

    logprobs: tuple[float, ...]
    """log P of each token, given all before it, in nats."""
    ranks: tuple[int, ...]
    """How many tokens were found more probable; 0 is what greedy decoding would write."""

    @property
    def total(self) -> float:
        """log P of the whole continuation."""
        return sum(self.logprobs)

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding would write it."""
        return not any(self.ranks)


def encoded(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> Pair:
    """Return the tokens of both as they are when they stand together.

    As lm-evaluation-harness does: both are encoded as one text and split where the context's own
    tokens end; spaces that end the context count as the continuation's.

    Raises:
        EvidenceError: one of them has no tokens.
    """
    kept = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    begin = len(tokenizer.encode(kept))
    if not 0 < begin < len(whole):
        raise EvidenceError(
            f"nothing can be scored in {continuation!r:.40} after {context!r:.40}: give a prompt "
            "and a choice that both hold text"
        )
    return Pair(tuple(whole[:begin]), tuple(whole[begin:]))


def likelihoods(
    base: BaseModel,
    pairs: Sequence[Pair],
    dropped: Sublayers = NO_SUBLAYERS,
    progress: Progress = silent,
    what: str = "scoring",
) -> list[Likelihood]:
    """Return the likelihood of each pair's continuation, in order.

    The substitutes that stand in the base model's dropped sublayers are used.

    Raises:
        EvidenceError: a pair is longer than the model's context.
    """
    limit = context_limit(base.model.config)
    if (longest := max(map(len, pairs), default=0)) > limit:
        raise EvidenceError(
            f"a prompt and its continuation have {longest} tokens, but {base.name} reads {limit}; "
            "leave such items out"
        )
    head, done = Head(base), 0
    found: dict[int, Likelihood] = {}
    for batch in _batches(pairs, _TOKENS.get(base.device.type, _TOKENS["cpu"])):
        scored = _scored(base, head, [pairs[index] for index in batch], dropped)
        found.update(zip(batch, scored, strict=True))
        done += len(batch)
        progress(what, done, len(pairs))
    return [found[index] for index in range(len(pairs))]


def _batches(pairs: Sequence[Pair], tokens: int) -> Iterator[list[int]]:
    """Yield indices of pairs, longest first, as many as fit into a batch together."""
    batch: list[int] = []
    for index in sorted(range(len(pairs)), key=lambda index: -len(pairs[index])):
        if batch and (len(batch) + 1) * len(pairs[batch[0]]) > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def _scored(
    base: BaseModel, head: Head, pairs: Sequence[Pair], dropped: Sublayers
) -> list[Likelihood]:
    rows = [torch.tensor(pair.context + pair.continuation) for pair in pairs]
    ids = pad_sequence(rows, batch_first=True).to(base.device)
    hidden = base.model.get_decoder()(  # type: ignore[no-untyped-call]
        ids,
        attend=CausalAttention(),
        **rows_kept(base.layers, ids.shape[1], dropped),
    ).last_hidden_state
    last = torch.cat(
        [
            row[len(pair.context) - 1 : len(pair) - 1]
            for row, pair in zip(hidden, pairs, strict=True)
        ]
    )
    targets = torch.tensor([token for pair in pairs for token in pair.continuation])
    logprobs, ranks = _judged(head, last, targets.to(base.device))
    sizes = [len(pair.continuation) for pair in pairs]
    return [
        Likelihood(tuple(each.tolist()), tuple(rank.tolist()))
        for each, rank in zip(torch.split(logprobs, sizes), torch.split(ranks, sizes), strict=True)
    ]


def _judged(head: Head, last: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log P and rank of each target, both [rows] on the CPU."""
    found, ranks = [], []
    for rows in head.slices(len(targets)):
        logprobs = head.logprobs(last[rows])
        chosen = logprobs.gather(1, targets[rows, None])
        found.append(chosen[:, 0].double())
        ranks.append((logprobs > chosen).sum(-1))
    return torch.cat(found).cpu(), torch.cat(ranks).cpu()
