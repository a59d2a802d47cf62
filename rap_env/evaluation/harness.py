"""lm-eval as the judge: it builds the requests and computes the metrics, our engine scores them."""

import contextlib
import copy
import functools
import hashlib
import io
import json
import logging
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Self

import datasets
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from rap_env.errors import EvaluationFailed, UnknownName
from rap_env.evaluation.evaluator import Evaluation, Evaluator
from rap_env.evaluation.scoring import Score, ScoringPlan, score_continuations
from rap_env.evaluation.tasks import TASKS_FOLDER
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.rng import isolated_rng

SMOOTH = "smooth_acc"
_HALVES = ("search", "report")


class ScoringLM(TemplateLM):
    """Our scoring engine behind lm-eval's interface; `simple_evaluate(model=ScoringLM(llm), ...)` works too.

    Contexts and continuations are split as lm-eval's own HF adapter splits them, without special tokens unless the
    tokenizer adds them by itself.
    """

    def __init__(self, llm: SwitchableLLM, batch_tokens: int = 4096) -> None:
        super().__init__()
        self.llm = llm
        self.tokenizer = llm.tokenizer
        self._batch_tokens = batch_tokens

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Stands in for an empty context: BOS, or EOS where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def encode_request(self, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens of a context and its continuation, cut from the left to the model's context."""
        if context:
            head, tail = self._encode_pair(context, continuation)
        else:
            tail = self.tok_encode(continuation, add_special_tokens=False)
            head = [self.prefix_token_id] if tail[0] != self.prefix_token_id else []
            head, tail = (head, tail) if head else (tail[:1], tail[1:])
        overflow = max(0, len(head) + len(tail) - 1 - self.llm.shape.context_tokens)
        return tuple(head[overflow:]), tuple(tail)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        pairs = [(tuple(context), tuple(continuation)) for _text, context, continuation in requests]
        return score_continuations(self.llm, pairs, self._batch_tokens)

    def loglikelihood_rolling(self, requests) -> list[float]:
        raise NotImplementedError("perplexity has its own evaluator: rap_env.evaluation.perplexity")

    def generate_until(self, requests) -> list[str]:
        raise NotImplementedError("only multiple-choice tasks are judged")


class HarnessEvaluator(Evaluator):
    """Zero-shot multiple-choice accuracy over lm-eval tasks.

    Metrics of a task: whatever its YAML lists (`acc`, `acc_norm`), and `smooth_acc`, the mean over items of the
    probability of the right choice, softmax over the choices' summed log-likelihoods. The score is the mean of
    `metric` over tasks, each task counting once, as in RAP's tables.

    Args:
        tasks: lm-eval task, tag or group names; the embedded ones are always known.
        include_path: Folder with further task YAMLs.
        half: `"search"` takes items 0, 2, 4, ... of each task, `"report"` items 1, 3, 5, ...; None takes all.
        limit: Number of first items of each task, or of the half of it; None for all.
        metric: What the score is the mean of.
        batch_tokens: Tokens that are forwarded at once.

    Raises:
        UnknownName: lm-eval and the folder have no such task.
        EvaluationFailed: A task is not multiple choice, does not have the metric, or has no item to judge.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        include_path: str | Path | None = None,
        half: str | None = None,
        limit: int | None = None,
        metric: str = "acc",
        batch_tokens: int = 4096,
    ) -> None:
        if half not in (None, *_HALVES):
            raise UnknownName("half", half, _HALVES)
        if limit is not None and limit < 1:
            raise EvaluationFailed(f"evaluation.limit must be at least 1 or None; got {limit}")
        self._metric = metric
        self._batch_tokens = batch_tokens
        self._rows: dict[str, list[int]] = {}
        self._planned: tuple | None = None  # the last tokenizer and its plan
        with isolated_rng(0):
            self._tasks = _load_tasks(list(tasks), include_path)
            for name, task in self._tasks.items():
                if task.OUTPUT_TYPE != "multiple_choice":
                    raise EvaluationFailed(f"task {name!r} is {task.OUTPUT_TYPE}; expected multiple_choice")
                if metric not in (*task.aggregation(), SMOOTH):
                    known = ", ".join((*task.aggregation(), SMOOTH))
                    raise EvaluationFailed(f"task {name!r} has no metric {metric!r}; it has {known}")
                task.set_config(key="num_fewshot", value=0)
                items = items_of(len(task.eval_docs), half, limit)
                if not items:
                    raise EvaluationFailed(f"task {name!r} has no item to judge; it has {len(task.eval_docs)} in all")
                self._rows[name] = items
                _build_requests(task, items)

    @functools.cached_property
    def identity(self) -> dict:
        requests = [
            [name, instance.args, instance.doc_id, _gold(task, instance.doc)]
            for name, task in self._tasks.items()
            for instance in task.instances
        ]
        return {
            "evaluator": "lm-eval",
            "metric": self._metric,
            "metrics": {name: sorted(task.aggregation()) for name, task in self._tasks.items()},
            "tasks": {name: str(task.config.metadata.get("version")) for name, task in self._tasks.items()},
            "requests": hashlib.sha256(json.dumps(requests, default=str).encode()).hexdigest(),
            "batch_tokens": self._batch_tokens,
            "versions": {library: version(library) for library in ("lm_eval", "torch", "transformers")},
        }

    @property
    def item_texts(self) -> dict[str, list[str]]:
        """The text of every item of each task, context and right choice, for the contamination check."""
        return {
            name: [
                f"{instances[0].args[0]}{instances[_gold(task, instances[0].doc)[0]].args[1]}"
                for instances in _by_document(task)
            ]
            for name, task in self._tasks.items()
        }

    def without(self, texts: Collection[str]) -> Self:
        """The same evaluator without the items that have one of these texts; see `item_texts`."""
        other = copy.copy(self)
        other.__dict__.pop("identity", None)
        other._planned, other._tasks, other._rows = None, {}, {}
        with isolated_rng(0):
            for name, task in self._tasks.items():
                rows = zip(self._rows[name], self.item_texts[name], strict=True)
                other._tasks[name] = copy.copy(task)
                other._rows[name] = [row for row, text in rows if text not in texts]
                _build_requests(other._tasks[name], other._rows[name])
        return other

    def peak_bytes(self, llm: SwitchableLLM, n_masks: int = 1) -> int:
        return self.plan(llm).peak_bytes(llm.shape, n_masks)

    def evaluate_many(
        self, llm: SwitchableLLM, masks: Sequence[PruningMask]
    ) -> Iterator[tuple[PruningMask, Evaluation]]:
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
            for instance in task.instances:
                instance.resps = [next(answers)]
            task.apply_filters()
            tasks[name] = _metrics(task)
        return tasks

    def plan(self, llm: SwitchableLLM) -> ScoringPlan:
        """How the requests are forwarded with a model's tokenizer."""
        if self._planned is None or self._planned[0] is not llm.tokenizer:
            lm = ScoringLM(llm)
            pairs = [lm.encode_request(*i.args) for task in self._tasks.values() for i in task.instances]
            self._planned = (llm.tokenizer, ScoringPlan(pairs, self._batch_tokens))
        return self._planned[1]


def _load_tasks(names: list[str], include_path: str | Path | None) -> dict:
    if not names:
        raise EvaluationFailed("expected at least one task name; got none")
    if include_path is not None and not Path(include_path).is_dir():
        raise EvaluationFailed(f"evaluation.include_path: no such folder: {include_path}")
    folders = [str(TASKS_FOLDER), *([] if include_path is None else [str(include_path)])]
    # Indexing lm-eval's thousands of tasks takes seconds; skip them when the folders have all that is asked for.
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(names) <= set(manager.task_index):
        manager = TaskManager(include_path=folders)
    for name in names:
        if name not in manager.task_index:
            raise UnknownName("task", name, manager.task_index)
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every task that takes keyword arguments
    return dict(sorted(manager.load(names)["tasks"].items()))


def items_of(n_items: int, half: str | None, limit: int | None) -> list[int]:
    """Indices of the items that are judged; the same list as `samples` makes lm-eval judge the same items."""
    indices = range(n_items) if half is None else range(_HALVES.index(half), n_items, 2)
    return list(indices[:limit])


def _build_requests(task, items: list[int]) -> None:
    with contextlib.redirect_stderr(io.StringIO()):  # lm-eval draws a progress bar for every task
        task.build_all_requests(samples=items)


def _by_document(task) -> list[list]:
    documents = defaultdict(list)
    for instance in task.instances:
        documents[instance.doc_id].append(instance)
    return [sorted(documents[key], key=lambda instance: instance.idx) for key in sorted(documents)]


def _gold(task, document: dict) -> list[int]:
    target = task.doc_to_target(document)
    targets = target if isinstance(target, list) else [target]
    choices = task.doc_to_choice(document)
    return [choices.index(value) if isinstance(value, str) else int(value) for value in targets]


def _metrics(task) -> dict[str, float]:
    values = defaultdict(list)
    for instances in _by_document(task):
        document = instances[0].doc
        responses = [next(iter(instance.filtered_resps.values())) for instance in instances]
        for metric, value in task.process_results(document, responses).items():
            values[metric].append(value)
        likelihoods = np.array([logprob for logprob, _greedy in responses])
        probabilities = np.exp(likelihoods - np.logaddexp.reduce(likelihoods))
        values[SMOOTH].append(float(probabilities[_gold(task, document)].sum()))
    metrics = {name: float(aggregate(values[name])) for name, aggregate in task.aggregation().items() if name in values}
    return metrics | {SMOOTH: float(np.mean(values[SMOOTH])), "items": len(values[SMOOTH])}
