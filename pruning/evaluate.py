"""Evaluation: the full model and any depths of a plan, on text and on conversation, in one run.

Text is read in windows. Conversation is teacher-forced: the full model writes answers to chat
prompts, and every variant is asked for its distribution at each token of them, so all are
compared at the same places. Generation is free: each variant writes its own answers, and what
went wrong with them is counted. Results are plain data with all that is needed to repeat them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from pruning.calibration import Progress, calibrate, calibration_source, silent
from pruning.conversation import Conversation, chat_messages, greedy, prompt_tokens, sampled
from pruning.divergence import Divergence, joined
from pruning.evidence import (
    Amount,
    Answer,
    Choices,
    Domain,
    Evaluation,
    EvidenceError,
    Example,
    Figures,
    Following,
    Health,
    Retrieval,
    TaskScore,
    clustered,
    mean_and_error,
)
from pruning.families import kv_shape
from pruning.likelihood import likelihoods
from pruning.loading import BaseModel
from pruning.multiple_choice import chosen_by, read_questions
from pruning.needle import hidden, retrieval
from pruning.plan import Plan, dtype_name, versions
from pruning.substitutes import Substitutes
from pruning.targets import ATTENTION, NO_SUBLAYERS, Sublayers
from pruning.trial import Trial

_WINDOWS = 4
"""Windows of text that are computed together."""
_NGRAM = 4
_WORST = 0.1
_EXAMPLES = 4
"""Prompts of a file that evidence keeps with their answers."""
_SHOWN = 2000
"""Characters of each that it keeps."""


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
        for sublayer in base.sublayers:
            sublayer.substitute = None  # of a plan that was measured before
        if substitutes is not None:
            substitutes.attach(base, plan.dropped_layers(self._depths[-1]))
        self._domains: list[Domain] = []
        self._figures: list[Figures] = []
        self._health: list[Health] = []
        self._choices: list[Choices] = []
        self._tasks: list[TaskScore] = []
        self._harness: str | None = None
        self._following: list[Following] = []
        self._retrieval: list[Retrieval] = []
        self._examples: list[Example] = []

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
        messages = chat_messages(Path(path), self._amount.prompts)
        prompts = [prompt_tokens(self._base, each) for each in messages]
        written = {depth: self._answers(prompts, depth) for depth in self._depths}
        asked = [str(each[-1].get("content")) for each in messages[:_EXAMPLES]]
        self._examples += [self._example(text, written, i) for i, text in enumerate(asked)]
        self._health.extend(_health(depth, each) for depth, each in written.items())
        batches = [
            (torch.cat([each.prompt, each.answer])[None], len(each.prompt)) for each in written[0]
        ]
        self._compare("conversation", calibration_source(path), batches)

    def multiple_choice(self, path: Path) -> None:
        """Measure on a JSON-lines file of questions.

        Raises:
            CalibrationError, EvidenceError: it is not usable.
        """
        questions = read_questions(path, self._amount.items)
        full: list[int] = []
        for depth in self._depths:
            what = f"{depth} dropped: {questions.task}"
            gone = self._plan.dropped(depth)
            picks = chosen_by(self._base, questions, gone, self._progress, what)
            full = full or picks
            rights = [pick == item.gold for pick, item in zip(picks, questions.items, strict=True)]
            same = [pick == other for pick, other in zip(picks, full, strict=True)]
            self._choices.append(
                Choices(
                    questions.task,
                    questions.source,
                    depth,
                    len(picks),
                    *mean_and_error(rights),
                    unchanged=sum(same) / len(same),
                )
            )

    def instructions(self, path: Path) -> None:
        """Measure on a JSON-lines file of prompts with checkable instructions (IFEval's).

        Raises:
            CalibrationError, EvidenceError: the harness is not installed, or the file not usable.
        """
        checks = _with_harness("pruning.instructions")
        instructed = checks.read_instructed(path, self._amount.instructions)
        asked = [[{"role": "user", "content": each.prompt}] for each in instructed.prompts]
        prompts = [prompt_tokens(self._base, each) for each in asked]
        self._harness = version("lm_eval")
        for depth in self._depths:
            gone, what = self._plan.dropped(depth), f"{depth} dropped: instructions"
            most = self._amount.instructed_answer
            written = greedy(self._base, prompts, most, gone, self._progress, what)
            answers = [self._text(each) for each in written]
            self._following.append(checks.followed(instructed, answers, depth))

    def needle(self, source: str, lengths: Sequence[int], places: Sequence[int]) -> None:
        """Measure how well sentences are found that are hidden in a calibration source's text.

        Args:
            lengths: of the prompts, in tokens.
            places: where the sentence stands, in percent of the text.

        Raises:
            CalibrationError: the source is not usable, or holds too little text.
            EvidenceError: a prompt does not fit the model's context, or is too short.
        """
        amount, base = self._amount, self._base
        for length in lengths:
            windows = calibrate(
                source, base, samples=amount.needles, length=length, seed=amount.seed
            ).token_ids
            for place in places:
                pairs = hidden(base.tokenizer, windows, place, amount.seed)
                for depth in self._depths:
                    gone, what = self._plan.dropped(depth), f"{depth} dropped: needles"
                    found = likelihoods(base, pairs, gone, self._progress, what)
                    self._retrieval.append(retrieval(found, depth, length, place))

    def tasks(self, names: Sequence[str]) -> None:
        """Measure on tasks of lm-evaluation-harness, or on files of questions through it.

        Raises:
            CalibrationError, EvidenceError: the harness is not installed, or a task not usable.
        """
        harness = _with_harness("pruning.harness")
        depths = [(depth, self._plan.dropped(depth)) for depth in self._depths]
        items, seed = self._amount.items, self._amount.seed
        self._harness = version("lm_eval")
        self._tasks += harness.harness_scores(
            self._base, names, depths, items, seed, self._progress
        )

    def result(self) -> Evaluation:
        """Return what was measured so far."""
        base, plan = self._base, self._plan
        record = plan.substitutes
        return Evaluation(
            model=base.name,
            fingerprint=base.fingerprint,
            layers=base.layers,
            kv_bytes=_kv_bytes(base),
            dtype=dtype_name(base),
            device=str(base.device),
            plan=plan.id,
            strategy=plan.strategy,
            attention_dropped=None
            if plan.target == ATTENTION
            else {depth: len(plan.dropped_layers(depth)) for depth in self._depths},
            substitutes=None if record is None else record.fingerprint,
            substitutes_kind=None if record is None else record.kind,
            amount=self._amount,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            versions=versions(),
            harness=self._harness,
            domains=tuple(self._domains),
            figures=tuple(self._figures),
            health=tuple(self._health),
            choices=tuple(self._choices),
            tasks=tuple(self._tasks),
            following=tuple(self._following),
            retrieval=tuple(self._retrieval),
            examples=tuple(self._examples),
        )

    def _answers(self, prompts: Sequence[Tensor], depth: int) -> list[Conversation]:
        seeds = [self._amount.seed + index for index in range(len(prompts))]
        gone, what = self._plan.dropped(depth), f"{depth} dropped: writing answers"
        most = self._amount.answer
        return sampled(self._base, prompts, most, seeds, gone, self._progress, what)

    def _example(
        self, asked: str, written: Mapping[int, Sequence[Conversation]], index: int
    ) -> Example:
        answers = [
            Answer(depth, self._text(each[index])[:_SHOWN], each[index].finished)
            for depth, each in written.items()
        ]
        return Example(asked[:_SHOWN], tuple(answers))

    def _text(self, written: Conversation) -> str:
        return str(self._base.tokenizer.decode(written.answer, skip_special_tokens=True))

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
        self._figures.extend(_figures(name, d, each, whole[0], sizes) for d, each in whole.items())

    def _divergences(self, token_ids: Tensor, predicted_from: int) -> dict[int, Divergence]:
        trial = Trial(self._base, token_ids, predicted_from=predicted_from)
        snapshots = []
        for depth, more in self._steps():
            places = {each: self._base.sublayers[each].substitute for each in more.attention}
            trial.drop(places, more.mlps)
            snapshots.append((depth, trial.snapshot()))
        compared = trial.divergences([last for _, last in snapshots])
        return {depth: each for (depth, _), each in zip(snapshots, compared, strict=True)}

    def _steps(self) -> Iterator[tuple[int, Sublayers]]:
        """Yield each depth with what it drops beyond the one before."""
        before = NO_SUBLAYERS
        for depth in self._depths:
            dropped = self._plan.dropped(depth)
            yield depth, dropped - before
            before = dropped


def _figures(
    domain: str, dropped: int, found: Divergence, full: Divergence, sizes: Sequence[int]
) -> Figures:
    kl, kl_error = _over_samples(found.kl, sizes)
    agreement, agreement_error = _over_samples(found.agrees.double(), sizes)
    _, loss_error = _over_samples(found.loss - full.loss, sizes)
    ratio = found.quality.perplexity / full.quality.perplexity
    p50, p90, p99 = torch.quantile(found.kl, torch.tensor([0.5, 0.9, 0.99]).double()).tolist()
    agrees = [part.double().mean() for part in torch.split(found.agrees, list(sizes))]
    return Figures(
        domain=domain,
        dropped=dropped,
        perplexity=found.quality.perplexity,
        perplexity_ratio=ratio,
        perplexity_ratio_error=ratio * loss_error,  # of exp(x), to first order
        kl=kl,
        kl_error=kl_error,
        kl_p50=p50,
        kl_p90=p90,
        kl_p99=p99,
        agreement=agreement,
        agreement_error=agreement_error,
        agreement_p10=torch.quantile(torch.stack(agrees), _WORST).item(),
    )


def _over_samples(values: Tensor, sizes: Sequence[int]) -> tuple[float, float]:
    """Return the mean of values [tokens] float64, and its standard error over samples."""
    return clustered([part.sum().item() for part in torch.split(values, list(sizes))], sizes)


def _health(dropped: int, written: Sequence[Conversation]) -> Health:
    length, length_error = mean_and_error([len(each.answer) for each in written])
    repeated, repeated_error = mean_and_error([repetition(e.answer.tolist()) for e in written])
    finished, finished_error = mean_and_error([each.finished for each in written])
    return Health(
        dropped=dropped,
        answers=len(written),
        mean_length=length,
        mean_length_error=length_error,
        repetition=repeated,
        repetition_error=repeated_error,
        finished=finished,
        finished_error=finished_error,
    )


def _with_harness(module: str) -> ModuleType:
    """Return a module that imports lm_eval.

    Raises:
        EvidenceError: what it needs is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise EvidenceError(
            f"lm-evaluation-harness is not installed ({error}): run `pip install "
            "'attndrop[evaluate]'`"
        ) from error


def _kv_bytes(base: BaseModel) -> int:
    """Return the bytes of one token's keys and values in one layer."""
    shape = kv_shape(base.model.config)
    return 2 * shape.kv_heads * shape.head_dim * base.model.dtype.itemsize


def repetition(tokens: Sequence[int]) -> float:
    """Return the share of runs of four tokens that came before; 0 for fewer than four tokens."""
    runs = [tuple(tokens[start : start + _NGRAM]) for start in range(len(tokens) - _NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
