"""Accuracy on lm-eval tasks: lm-eval builds, encodes and marks the requests, our engine scores them."""

import copy
import functools
import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Self

import numpy as np

from rap_env.errors import EvaluationFailed, UnknownName
from rap_env.evaluation.evaluator import Evaluation, Evaluator
from rap_env.evaluation.lm import RapLM
from rap_env.evaluation.scoring import Pair, Score, ScoringPlan
from rap_env.evaluation.task_loading import build_requests, load_tasks, naming
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.rng import isolated_rng

SMOOTH = "smooth_acc"
_HALVES = ("search", "report")
_UNLIKELY = -1000.0  # a log-likelihood
_of_any_length = np.errstate(divide="ignore", invalid="ignore")  # lm-eval divides by the lengths of choices, perhaps 0


@dataclass(frozen=True)
class _Item:
    """A row of a task's data set."""

    index: int
    requests: tuple  # lm-eval's, one for each choice; `acc_mutual_info` adds those without context
    n_choices: int
    right: tuple[int, ...] | None  # what lm-eval counts as right; None if the task has marks of its own only

    @property
    def text(self) -> str:
        """Context and first right choice; the first choice where none is right."""
        return "".join(self.requests[self.right[0] if self.right else 0].args)


class HarnessEvaluator(Evaluator):
    """Zero-shot multiple-choice accuracy over lm-eval tasks.

    Metrics of a task: whatever its YAML lists (`acc`, `acc_norm`), and `smooth_acc`, the mean over items of the
    probability of the right choice, softmax over the choices' summed log-likelihoods. The score is the mean of
    `metric` over tasks, each task counting once, as in RAP's tables.

    Args:
        tasks: lm-eval task, tag or group names, or one of them; the embedded ones are always known.
        include_path: Folder with further task YAMLs.
        half: `"search"` takes items 0, 2, 4, ... of each task, `"report"` items 1, 3, 5, ...; None takes all.
        limit: Number of first items of each task, or of the half of it; None for all.
        metric: What the score is the mean of.
        batch_tokens: Tokens that are forwarded at once.

    Raises:
        UnknownName: lm-eval and the folder have no such task.
        EvaluationFailed: A task is not multiple choice, does not have the metric, has no item, or one of which lm-eval
            can't make or mark requests.
    """

    def __init__(
        self,
        tasks: str | Sequence[str],
        include_path: str | Path | None = None,
        half: str | None = None,
        limit: int | None = None,
        metric: str = "acc",
        batch_tokens: int = 4096,
    ) -> None:
        if half not in (None, *_HALVES):
            raise UnknownName("half", half, _HALVES)
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise EvaluationFailed(f"evaluation.limit must be a whole number, at least 1, or None; got {limit}")
        names = [tasks] if isinstance(tasks, str) else sorted(tasks)
        self.name = ", ".join(names) + (f" ({half} half)" if half else "")
        self._metric, self._batch_tokens = metric, batch_tokens
        with isolated_rng(0):
            loaded = load_tasks(names, include_path)
            for name, task in loaded.items():
                if task.OUTPUT_TYPE != "multiple_choice":
                    raise EvaluationFailed(f"task {name!r} is {task.OUTPUT_TYPE}; expected multiple_choice")
                task.set_config(key="num_fewshot", value=0)
            self._build(loaded, {name: items_of(len(task.eval_docs), half, limit) for name, task in loaded.items()})

    def _build(self, tasks: Mapping, rows: Mapping[str, Sequence[int]]) -> None:
        """Takes some rows of each task, and builds their requests."""
        self._tasks, self._items = tasks, {}
        self._planned = None, None  # the last tokenizer and context length, and their plan
        self.__dict__.pop("identity", None)
        for name, task in tasks.items():
            if not rows[name]:
                raise EvaluationFailed(f"task {name!r} has no item to evaluate; it has {len(task.eval_docs)} in all")
            self._items[name] = _items(name, task, rows[name])
            if self._metric not in (known := _metrics_of(task, self._items[name])):
                raise EvaluationFailed(f"task {name!r} has no metric {self._metric!r}; it has {', '.join(known)}")
        # What lm-eval can't average is refused now, not after everything was forwarded.
        n_requests = sum(len(item.requests) for items in self._items.values() for item in items)
        self._task_metrics([(_UNLIKELY, False)] * n_requests)

    @functools.cached_property
    def identity(self) -> dict:
        requests = [
            [name, item.index, item.right, [request.args for request in item.requests]]
            for name, items in self._items.items()
            for item in items
        ]
        return {
            "kind": "lm-eval",
            "name": self.name,
            "metric": self._metric,
            "metrics": {name: _metrics_of(task, self._items[name]) for name, task in self._tasks.items()},
            "tasks": {name: str((task.config.metadata or {}).get("version")) for name, task in self._tasks.items()},
            "requests": hashlib.sha256(json.dumps(requests, default=str).encode()).hexdigest(),
            "batch_tokens": self._batch_tokens,
            "versions": {library: version(library) for library in ("lm_eval", "torch", "transformers")},
        }

    @property
    def item_texts(self) -> dict[str, list[str]]:
        """The text of every item of each task, context and right choice, for the contamination check."""
        return {name: [item.text for item in items] for name, items in self._items.items()}

    def without(self, texts: Collection[str]) -> Self:
        """The same evaluator without the items that have one of these texts; see `item_texts`.

        Raises:
            EvaluationFailed: No item of a task is left.
        """
        texts, other = set(texts), copy.copy(self)
        rows = {name: [item.index for item in items if item.text not in texts] for name, items in self._items.items()}
        with isolated_rng(0):
            other._build({name: copy.copy(task) for name, task in self._tasks.items()}, rows)
        return other

    def first(self, fraction: float) -> Self:
        """The same evaluator on the first items of each task."""
        texts = self.item_texts
        kept = {text for of_task in texts.values() for text in of_task[: math.ceil(fraction * len(of_task))]}
        later = {text for of_task in texts.values() for text in of_task} - kept
        return self.without(later) if later else self

    def tokens(self, llm: SwitchableLLM) -> int:
        return self.plan(llm).tokens

    def plan(self, llm: SwitchableLLM) -> ScoringPlan:
        """How the requests are forwarded with a model's tokenizer; `EvaluationFailed` names an item that can't be."""
        key = llm.tokenizer, llm.shape.context_tokens
        if self._planned[0] != key:
            lm = RapLM(llm)
            pairs = [
                lm.pair(request, f"task {name!r}, item {item.index}, choice {number % item.n_choices}")
                for name, items in self._items.items()
                for item in items
                for number, request in enumerate(item.requests)
            ]
            self._planned = key, ScoringPlan(pairs, self._batch_tokens)
        return self._planned[1]

    def right_answers(self, llm: SwitchableLLM) -> list[Pair]:
        pairs, answers = iter(self.plan(llm).pairs), []
        for item in (item for items in self._items.values() for item in items):
            own = [next(pairs) for _request in item.requests]
            answers += [own[item.right[0]]] if item.right else []
        return answers

    def evaluate_many(
        self, llm: SwitchableLLM, masks: Sequence[PruningMask], near: PruningMask | None = None
    ) -> Iterator[tuple[PruningMask, Evaluation]]:
        """Evaluates distinct masks, whatever mask is applied; no stream is held between calls, so `near` is unused."""
        started, plan = time.perf_counter(), self.plan(llm)
        for mask, scores in plan.run(llm, masks):
            with isolated_rng(0):
                tasks = self._task_metrics(scores)
            score = float(np.mean([metrics[self._metric] for metrics in tasks.values()]))
            finished = time.perf_counter()
            yield mask, Evaluation(score, tasks, plan.tokens, finished - started)
            started = finished

    def _task_metrics(self, scores: list[Score]) -> dict[str, dict[str, float]]:
        answers, tasks = iter(scores), {}
        for name, task in self._tasks.items():
            for item in self._items[name]:
                for request in item.requests:
                    request.resps = [next(answers)]
            with naming(f"task {name!r}"):
                task.apply_filters()
                tasks[name] = _metrics(task, self._items[name])
        return tasks


def items_of(n_items: int, half: str | None, limit: int | None) -> list[int]:
    """Indices of the items that are evaluated; the same list as `samples` makes lm-eval evaluate the same items."""
    indices = range(n_items) if half is None else range(_HALVES.index(half), n_items, 2)
    return list(indices[:limit])


def _items(name: str, task, rows: Sequence[int]) -> list[_Item]:
    """Builds the requests of some rows of a task; lm-eval numbers them anew, from 0."""
    build_requests(name, task, rows)
    requests = defaultdict(list)
    for request in task.instances:
        requests[request.doc_id].append(request)
    marking = copy.copy(task)
    marking._metric_fn_list = {**task._metric_fn_list, "acc": None}  # so that it always tells `acc`
    items = []
    for position, row in enumerate(rows):
        if not requests[position]:
            raise EvaluationFailed(f"task {name!r}, item {row}: it has no choices")
        own = tuple(sorted(requests[position], key=lambda request: request.idx))
        with naming(f"task {name!r}, item {row}"):
            n_choices = len(task.doc_to_choice(own[0].doc))
            items.append(_Item(row, own, n_choices, _right_choices(marking, own, n_choices)))
    return items


@_of_any_length
def _right_choices(task, requests: Sequence, n_choices: int) -> tuple[int, ...] | None:
    """The choices for which lm-eval gives a whole point when they are by far the likeliest."""
    right = []
    for choice in range(n_choices):
        answers = [(0.0, True) if index == choice else (_UNLIKELY, False) for index in range(len(requests))]
        marks = task.process_results(requests[0].doc, answers)
        if "acc" not in marks:
            return None
        if marks["acc"] == 1:
            right.append(choice)
    return tuple(right)


def _metrics_of(task, items: Sequence[_Item]) -> list[str]:
    return [*task.aggregation(), *([SMOOTH] if items[0].right is not None else [])]


@_of_any_length
def _metrics(task, items: Sequence[_Item]) -> dict[str, float]:
    values = defaultdict(list)
    for item in items:
        answers = [next(iter(request.filtered_resps.values())) for request in item.requests]
        for metric, value in task.process_results(item.requests[0].doc, answers).items():
            values[metric].append(value)
        if item.right is not None:
            likelihoods = np.array([logprob for logprob, _greedy in answers[: item.n_choices]])
            probabilities = np.exp(likelihoods - np.logaddexp.reduce(likelihoods))
            values[SMOOTH].append(float(probabilities[list(item.right)].sum()))
    aggregations = task.aggregation() | {SMOOTH: np.mean}
    metrics = {name: float(aggregations[name](values[name])) for name in aggregations if name in values}
    return metrics | {"items": len(items)}
