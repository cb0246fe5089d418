"""lm-evaluation-harness over variants: its own tasks, and local files of questions.

The harness asks and scores; a variant answers through `HarnessModel`. A task is a name of the
harness (its data come from the hub, or from the hub's cache), or a file of questions as in
multiple_choice.py, which needs no network. Imports lm_eval at once, so it is imported late.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pruning.calibration import JSON_LINES_SUFFIXES, Progress, first_token, silent
from pruning.conversation import greedy
from pruning.evidence import EvidenceError, TaskScore
from pruning.families import context_limit
from pruning.likelihood import Pair, encoded, likelihoods
from pruning.loading import BaseModel
from pruning.multiple_choice import DELIMITER, read_questions
from pruning.targets import Sublayers

_BOOTSTRAPS = 1000
"""Of metrics whose standard error has no formula."""
_ANSWER = 256
"""Tokens of an answer where a task does not say."""
_SPLIT = "questions"


class HarnessModel(LM):  # type: ignore[misc]
    """A variant of a base model, as the harness wants models to be."""

    def __init__(self, base: BaseModel, dropped: Sublayers, progress: Progress, what: str) -> None:
        super().__init__()
        self._base, self._dropped = base, dropped
        self._progress, self._what = progress, what

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return log P of each continuation, and whether greedy decoding would write it."""
        pairs = [self._pair(*request.args) for request in requests]
        found = likelihoods(self._base, pairs, self._dropped, self._progress, self._what)
        return [(each.total, each.greedy) for each in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return log P of whole texts, in windows of the model's context."""
        windows = [self._windows(request.args[0]) for request in requests]
        pairs = [pair for each in windows for pair in each]
        found = iter(likelihoods(self._base, pairs, self._dropped, self._progress, self._what))
        return [sum(next(found).total for _ in each) for each in windows]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return greedy answers, cut before the first of each request's stop texts."""
        tokenizer, alike = self._base.tokenizer, defaultdict[int, list[int]](list)
        prompts = [torch.tensor(tokenizer.encode(request.args[0])) for request in requests]
        for index, request in enumerate(requests):
            alike[self._most(request.args[1], len(prompts[index]))].append(index)
        answers: dict[int, str] = {}
        for most, indices in alike.items():
            asked = [prompts[index] for index in indices]
            found = greedy(self._base, asked, most, self._dropped, self._progress, self._what)
            for index, each in zip(indices, found, strict=True):
                text = str(tokenizer.decode(each.answer, skip_special_tokens=True))
                answers[index] = _cut(text, requests[index].args[1].get("until", ()))
        return [answers[index] for index in range(len(requests))]

    def _most(self, options: Mapping[str, Any], prompt: int) -> int:
        """Return how many tokens may follow a prompt of so many."""
        if options.get("do_sample"):
            raise EvidenceError(f"{self._what}: only greedy decoding is offered")
        limit = context_limit(self._base.model.config)
        if prompt >= limit:
            raise EvidenceError(f"{self._what}: a prompt fills the context of {limit} tokens")
        return min(int(options.get("max_gen_toks", _ANSWER)), limit - prompt)

    def _pair(self, context: str, continuation: str) -> Pair:
        if context:
            return encoded(self._base.tokenizer, context, continuation)
        tokens = self._base.tokenizer.encode(continuation, add_special_tokens=False)
        return Pair((first_token(self._base),), tuple(tokens))

    def _windows(self, text: str) -> list[Pair]:
        tokens = self._base.tokenizer.encode(text, add_special_tokens=False)
        longest = context_limit(self._base.model.config) - 1
        windows = get_rolling_token_windows(tokens, first_token(self._base), longest, 1)
        return [Pair(tuple(a), tuple(b)) for a, b in map(make_disjoint_window, windows)]


def harness_scores(
    base: BaseModel,
    tasks: Sequence[str],
    depths: Sequence[tuple[int, Sublayers]],
    items: int,
    seed: int,
    progress: Progress = silent,
) -> list[TaskScore]:
    """Return every metric of each task at each depth.

    Args:
        tasks: names of the harness, or paths of files of questions.
        depths: numbers of dropped layers, each with what is dropped.
        items: documents of each task at most, at an even stride.
        seed: of the examples that a prompt begins with, in tasks that have some.

    Raises:
        EvidenceError: a task is not known, or its data cannot be had.
        CalibrationError: a file is not usable.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    loaded = [task for name in tasks for task in _loaded(name, items)]
    for each in loaded:
        if each.get_config("num_fewshot") is None:
            each.set_config(key="num_fewshot", value=0)
        each.set_fewshot_seed(seed=seed)
    samples = {task.config.task: _stride(len(task.eval_docs), items) for task in loaded}
    scores: list[TaskScore] = []
    for depth, dropped in depths:
        model = HarnessModel(base, dropped, progress, f"{depth} dropped: harness")
        found = evaluate(
            model,
            {"tasks": {task.config.task: task for task in loaded}, "groups": {}, "group_map": {}},
            samples=samples,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
        )
        for task, chosen in samples.items():
            scores += _scores(task, depth, len(chosen), found["results"][task])
    return scores


def _loaded(name: str, items: int) -> list[Any]:
    """Return the harness's task objects that a name stands for: one, or those of a group."""
    if Path(name).suffix in JSON_LINES_SUFFIXES:
        return [_local_task(Path(name), items)]
    manager = TaskManager()
    if name not in manager.all_tasks:
        raise EvidenceError(
            f"lm-evaluation-harness {version('lm_eval')} has no task {name!r}; `lm-eval ls tasks` "
            "lists them, and a file of questions has to end in .jsonl"
        )
    try:
        return list(manager.load([name])["tasks"].values())
    except (OSError, ValueError, RuntimeError) as error:
        raise EvidenceError(
            f"the data of task {name!r} cannot be had: {str(error).splitlines()[0]}; check the "
            "network, or give a file of questions"
        ) from error


def _local_task(path: Path, items: int) -> Any:
    """Return a task of the harness whose documents are a file of questions."""
    found = read_questions(path, items)
    shared = {len(set(item.contexts)) > 1 for item in found.items}
    if len(shared) > 1:
        raise EvidenceError(f"{path} mixes shared prompts and shared continuations; split it")
    documents = [
        {"contexts": item.contexts, "texts": item.continuations, "gold": item.gold}
        for item in found.items
    ]
    config = {
        "task": found.task,
        "custom_dataset": lambda **_: {_SPLIT: Dataset.from_list(documents)},
        "test_split": _SPLIT,
        "output_type": "multiple_choice",
        "target_delimiter": DELIMITER,
        "num_fewshot": 0,
        **(_SHARED_CONTINUATION if shared.pop() else _SHARED_PROMPT),
    }
    return ConfigurableTask(config=config)


_SHARED_PROMPT: dict[str, Any] = {
    "doc_to_text": lambda doc: doc["contexts"][0],
    "doc_to_choice": lambda doc: doc["texts"],
    "doc_to_target": lambda doc: doc["gold"],
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
_SHARED_CONTINUATION: dict[str, Any] = {  # as its task `winogrande`
    "doc_to_text": lambda doc: doc["gold"],
    "doc_to_choice": lambda doc: doc["contexts"],
    "doc_to_target": lambda doc: doc["texts"][0],
    "metric_list": [{"metric": "acc"}],
}


def _stride(count: int, items: int) -> list[int]:
    chosen = min(count, items)
    return [index * count // chosen for index in range(chosen)]


def _scores(task: str, depth: int, items: int, found: dict[str, Any]) -> Iterator[TaskScore]:
    """Yield what the harness found about one task; its keys are `metric,filter`."""
    for key, value in found.items():
        metric, _, filtered = key.partition(",")
        if filtered and not metric.endswith("_stderr") and isinstance(value, float | int):
            error = found.get(f"{metric}_stderr,{filtered}")
            known = float(error) if isinstance(error, float | int) else None
            yield TaskScore(task, metric, depth, items, float(value), known)


def _cut(text: str, stops: Sequence[str] | str) -> str:
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text
