"""Several evaluators as one: a text and tasks beside it, or kinds of text."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from rap_env.errors import InvalidReward
from rap_env.evaluation.evaluator import Evaluation, Evaluator
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask


class MixtureEvaluator(Evaluator):
    """The score is a weighted sum of those of other evaluators; all of their tasks are told.

    Args:
        parts: Evaluators with their weights, which say what one unit of a score is worth: a nat of loss, say, as much
            as a whole of accuracy.

    Raises:
        InvalidReward: There are fewer than two, a weight is not above 0, or two have a task of one name.
    """

    def __init__(self, parts: Sequence[tuple[Evaluator, float]]) -> None:
        if len(parts) < 2 or not all(weight > 0.0 for _evaluator, weight in parts):
            raise InvalidReward(f"expected two evaluators or more, with weights above 0; got {[w for _, w in parts]}")
        self._parts = tuple((evaluator, float(weight)) for evaluator, weight in parts)  # 1 and 1.0 are one identity
        self.name = " + ".join(f"{weight:g} x {evaluator.name}" for evaluator, weight in parts)

    @property
    def setup_tokens(self) -> int:
        return sum(evaluator.setup_tokens for evaluator, _weight in self._parts)

    @property
    def identity(self) -> dict[str, Any]:
        parts = [{"evaluator": dict(evaluator.identity), "weight": weight} for evaluator, weight in self._parts]
        return {"evaluator": "mixture", "parts": parts}

    def tokens(self, llm: SwitchableLLM) -> int:
        return sum(evaluator.tokens(llm) for evaluator, _weight in self._parts)

    def first(self, fraction: float) -> Self:
        return type(self)([(evaluator.first(fraction), weight) for evaluator, weight in self._parts])

    def right_answers(self, llm: SwitchableLLM) -> list[tuple[list[int], list[int]]]:
        """Those of all parts."""
        return [answer for evaluator, _weight in self._parts for answer in evaluator.right_answers(llm)]

    def evaluate_many(
        self, llm: SwitchableLLM, masks: Sequence[PruningMask], near: PruningMask | None = None
    ) -> Iterator[tuple[PruningMask, Evaluation]]:
        started = time.perf_counter()
        *others, (last, weight_of_last) = self._parts
        found: dict[PruningMask, list[tuple[Evaluation, float]]] = {mask: [] for mask in masks}
        for evaluator, weight in others:
            for mask, evaluation in evaluator.evaluate_many(llm, masks, near):
                found[mask].append((evaluation, weight))
        for mask, evaluation in last.evaluate_many(llm, masks, near):
            of_parts = [*found[mask], (evaluation, weight_of_last)]
            finished = time.perf_counter()
            score = sum(weight * evaluation.score for evaluation, weight in of_parts)
            tokens = sum(evaluation.tokens for evaluation, _weight in of_parts)
            tasks = self._tasks([evaluation for evaluation, _weight in of_parts])
            yield mask, Evaluation(score, tasks, tokens, finished - started)
            started = finished

    def _tasks(self, of_parts: Sequence[Evaluation]) -> dict[str, Mapping[str, float]]:
        tasks: dict[str, Mapping[str, float]] = {}
        for evaluation in of_parts:
            if shared := sorted(tasks.keys() & evaluation.tasks):
                raise InvalidReward(f"expected parts of a mixture with own tasks; two have {', '.join(shared)}")
            tasks |= evaluation.tasks
        return tasks


class KindsEvaluator(MixtureEvaluator):
    """The score is the mean over kinds of text; for a workload of a kind that kind's score counts.

    One evaluation of a mask tells about all kinds, and takes the tokens of all of them.

    Args:
        of_kinds: An evaluator for each kind.

    Raises:
        InvalidReward: There is no kind.
    """

    def __init__(self, of_kinds: Mapping[str, Evaluator]) -> None:
        if not of_kinds:
            raise InvalidReward("expected an evaluator for each kind of text; got none")
        self.kinds, self._parts = tuple(of_kinds), tuple((each, 1.0 / len(of_kinds)) for each in of_kinds.values())
        self.name = f"text of {len(of_kinds)} kinds"

    @property
    def identity(self) -> dict[str, Any]:
        parts = zip(self.kinds, self._parts, strict=True)
        return {"evaluator": "kinds", "kinds": {kind: dict(each.identity) for kind, (each, _weight) in parts}}

    def first(self, fraction: float) -> Self:
        parts = zip(self.kinds, self._parts, strict=True)
        return type(self)({kind: evaluator.first(fraction) for kind, (evaluator, _weight) in parts})

    def _tasks(self, of_parts: Sequence[Evaluation]) -> dict[str, Mapping[str, float]]:
        tasks: dict[str, Mapping[str, float]] = {}
        for kind, evaluation in zip(self.kinds, of_parts, strict=True):
            tasks[kind] = {"score": evaluation.score}
            tasks |= {f"{kind}: {name}": metrics for name, metrics in evaluation.tasks.items()}
        return tasks
