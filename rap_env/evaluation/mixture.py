"""Several evaluators as one: what a mask is worth on a text, and on tasks beside it."""

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
        self._parts = tuple(parts)
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
            yield mask, _sum(of_parts, finished - started)
            started = finished


def _sum(of_parts: Sequence[tuple[Evaluation, float]], seconds: float) -> Evaluation:
    tasks: dict[str, Mapping[str, float]] = {}
    for evaluation, _weight in of_parts:
        if shared := sorted(tasks.keys() & evaluation.tasks):
            raise InvalidReward(f"expected parts of a mixture with tasks of their own; two have {', '.join(shared)}")
        tasks |= evaluation.tasks
    score = sum(weight * evaluation.score for evaluation, weight in of_parts)
    return Evaluation(score, tasks, sum(evaluation.tokens for evaluation, _weight in of_parts), seconds)
