"""Evaluation: the full model and any depths of a plan, on text and on conversation, in one run.

Text is read in windows. Conversation is teacher-forced: the full model writes answers to chat
prompts, and every variant is asked for its distribution at each token of them, so all are
compared at the same places. Generation is free: each variant writes its own answers, and what
went wrong with them is counted. Results are plain data with all that is needed to repeat them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.calibration import Progress, calibrate, calibration_source, silent
from pruning.conversation import Conversation, answered, chat_prompts
from pruning.divergence import Divergence, joined
from pruning.loading import BaseModel
from pruning.plan import Plan, Versions, dtype_name, versions
from pruning.substitutes import Substitutes
from pruning.trial import Trial

_WINDOWS = 4
"""Windows of text that are computed together."""
_NGRAM = 4
_WORST = 0.1


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
    kl: float
    """KL(full || variant) in nats, mean over tokens."""
    kl_error: float
    """Standard error of that mean, over samples (tokens of one sample are not independent)."""
    kl_p50: float
    kl_p90: float
    kl_p99: float
    """Quantiles over tokens."""
    agreement: float
    agreement_p10: float
    """The tenth percentile of the samples' own agreement."""


@dataclass(frozen=True, slots=True)
class Health:
    """The answers that one depth wrote freely."""

    dropped: int
    answers: int
    mean_length: float
    """Tokens."""
    repetition: float
    """Share of the four-token runs that the same answer held before, mean over answers."""
    finished: float
    """Share of the answers that ended by themselves, and not by length."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything that was measured, and what it takes to measure it again."""

    model: str
    fingerprint: str
    dtype: str
    device: str
    plan: str
    strategy: str
    substitutes: str | None
    """The fingerprint of the plan's substitutes."""
    amount: Amount
    versions: Versions
    domains: tuple[Domain, ...]
    figures: tuple[Figures, ...]
    health: tuple[Health, ...]


_Sample = tuple[Tensor, int]
"""Token ids [samples, length], and the first position whose token is predicted."""


class Evaluator:
    """Compares depths of one plan with the full model, domain by domain."""

    def __init__(
        self,
        base: BaseModel,
        plan: Plan,
        substitutes: Substitutes | None,
        depths: Sequence[int],
        amount: Amount,
        progress: Progress = silent,
    ) -> None:
        """depths are numbers of layers to drop; the full model is always measured.

        Raises:
            PlanError: a depth is more than the plan's ranking holds.
            SubstituteError: a substitute is missing or does not fit.
        """
        self._base = base
        self._plan = plan
        self._depths = sorted({0, *depths})
        self._amount = amount
        self._progress = progress
        if substitutes is not None:
            substitutes.attach(base, plan.dropped_layers(self._depths[-1]))
        self._domains: list[Domain] = []
        self._figures: list[Figures] = []
        self._health: list[Health] = []

    def text(self, path: str) -> None:
        """Measure on a text file, or any other calibration source.

        Raises:
            CalibrationError: it is not usable.
            DivergenceError: logits are not finite.
        """
        amount = self._amount
        table = calibrate(
            path, self._base, samples=amount.windows, length=amount.length, seed=amount.seed
        ).token_ids
        batches = [(part, 1) for part in torch.split(table, _WINDOWS)]
        self._compare("text", calibration_source(path), batches)

    def conversation(self, path: str) -> None:
        """Measure on answers of the full model to the chat prompts of a JSON-lines file, and let
        each depth write answers of its own.

        Raises:
            CalibrationError, DivergenceError: as in `text`.
        """
        prompts = chat_prompts(path, self._base, self._amount.prompts)
        written = {depth: self._answers(prompts, depth) for depth in self._depths}
        self._health.extend(_health(depth, each) for depth, each in written.items())
        batches = [
            (torch.cat([each.prompt, each.answer])[None], len(each.prompt)) for each in written[0]
        ]
        self._compare("conversation", calibration_source(path), batches)

    def result(self) -> Evaluation:
        """Return what was measured so far."""
        base, plan = self._base, self._plan
        return Evaluation(
            model=base.name,
            fingerprint=base.fingerprint,
            dtype=dtype_name(base),
            device=str(base.device),
            plan=plan.id,
            strategy=plan.strategy,
            substitutes=None if plan.substitutes is None else plan.substitutes.fingerprint,
            amount=self._amount,
            versions=versions(),
            domains=tuple(self._domains),
            figures=tuple(self._figures),
            health=tuple(self._health),
        )

    def _answers(self, prompts: Sequence[Tensor], depth: int) -> list[Conversation]:
        dropped = self._plan.dropped_layers(depth)
        written = []
        for index, prompt in enumerate(prompts):
            seed = self._amount.seed + index
            written.append(answered(self._base, prompt, self._amount.answer, seed, dropped))
            self._progress(f"{depth} dropped: writing answers", index + 1, len(prompts))
        return written

    def _compare(self, name: str, source: str, batches: Sequence[_Sample]) -> None:
        found: dict[int, list[Divergence]] = {depth: [] for depth in self._depths}
        sizes: list[int] = []
        digest = hashlib.sha256()
        for index, (token_ids, predicted_from) in enumerate(batches, start=1):
            digest.update(token_ids.numpy().astype("<i8").tobytes())
            sizes += [token_ids.shape[1] - predicted_from] * len(token_ids)
            for depth, divergence in self._divergences(token_ids, predicted_from).items():
                found[depth].append(divergence)
            self._progress(f"comparing on {name}", index, len(batches))
        whole = {depth: joined(parts) for depth, parts in found.items()}
        self._domains.append(
            Domain(name, source, len(sizes), sum(sizes), f"sha256:{digest.hexdigest()}")
        )
        full = whole[0].quality.perplexity
        self._figures.extend(_figures(name, d, each, sizes, full) for d, each in whole.items())

    def _divergences(self, token_ids: Tensor, predicted_from: int) -> dict[int, Divergence]:
        trial = Trial(self._base, token_ids, predicted_from=predicted_from)
        snapshots = []
        for depth, layers in self._steps():
            trial.drop({layer: self._base.sublayers[layer].substitute for layer in layers})
            snapshots.append((depth, trial.snapshot()))
        compared = trial.divergences([last for _, last in snapshots])
        return {depth: each for (depth, _), each in zip(snapshots, compared, strict=True)}

    def _steps(self) -> Iterator[tuple[int, frozenset[int]]]:
        """Yield each depth with the layers that it drops beyond the one before."""
        before: frozenset[int] = frozenset()
        for depth in self._depths:
            dropped = self._plan.dropped_layers(depth)
            yield depth, dropped - before
            before = dropped


def evaluate(
    base: BaseModel,
    plan: Plan,
    substitutes: Substitutes | None,
    depths: Sequence[int],
    texts: Sequence[str],
    conversations: Sequence[str],
    amount: Amount,
    progress: Progress = silent,
) -> Evaluation:
    """Return the evaluation on texts, and on conversations that follow the chat prompts of files.

    Raises:
        PlanError, SubstituteError, CalibrationError, DivergenceError: as the evaluator does.
    """
    evaluator = Evaluator(base, plan, substitutes, depths, amount, progress)
    for path in texts:
        evaluator.text(path)
    for path in conversations:
        evaluator.conversation(path)
    return evaluator.result()


def _figures(
    domain: str, dropped: int, found: Divergence, sizes: Sequence[int], full: float
) -> Figures:
    quality = found.quality
    kl = torch.tensor(
        [part.mean() for part in torch.split(found.kl, list(sizes))], dtype=torch.float64
    )
    agrees = [part.double().mean() for part in torch.split(found.agrees, list(sizes))]
    p50, p90, p99 = torch.quantile(found.kl, torch.tensor([0.5, 0.9, 0.99]).double()).tolist()
    return Figures(
        domain=domain,
        dropped=dropped,
        perplexity=quality.perplexity,
        perplexity_ratio=quality.perplexity / full,
        kl=quality.kl,
        kl_error=kl.std().item() / len(kl) ** 0.5 if len(kl) > 1 else 0.0,
        kl_p50=p50,
        kl_p90=p90,
        kl_p99=p99,
        agreement=quality.agreement,
        agreement_p10=torch.quantile(torch.stack(agrees), _WORST).item(),
    )


def _health(dropped: int, written: Sequence[Conversation]) -> Health:
    return Health(
        dropped=dropped,
        answers=len(written),
        mean_length=sum(len(each.answer) for each in written) / len(written),
        repetition=sum(repetition(each.answer.tolist()) for each in written) / len(written),
        finished=sum(each.finished for each in written) / len(written),
    )


def repetition(tokens: Sequence[int]) -> float:
    """Return the share of runs of four tokens that came before; 0 for fewer than four tokens."""
    runs = [tuple(tokens[start : start + _NGRAM]) for start in range(len(tokens) - _NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
