"""An evaluator whose masks are evaluated by workers, with exactly the results of one process."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rap_env.evaluation.evaluator import Evaluation, Evaluator
from rap_env.evaluation.workers import Workers
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask


class RemoteEvaluator(Evaluator):
    """Another evaluator, run by workers. It has that one's identity, so that stored results are found by both.

    Args:
        inner: What the workers evaluate with; it is sent to each of them once.
        workers: May be shared by many evaluators.
    """

    def __init__(self, inner: Evaluator, workers: Workers) -> None:
        self.inner, self.workers = inner, workers
        self.name, self.setup_tokens, self.runs_model = inner.name, inner.setup_tokens, inner.runs_model
        self.kinds = inner.kinds

    @property
    def identity(self) -> Mapping[str, Any]:
        return self.inner.identity

    def tokens(self, llm: SwitchableLLM) -> int:
        return self.inner.tokens(llm)

    def right_answers(self, llm: SwitchableLLM) -> Sequence[tuple[Sequence[int], Sequence[int]]]:
        return self.inner.right_answers(llm)

    def first(self, fraction: float) -> Evaluator:
        inner = self.inner.first(fraction)
        return self if inner is self.inner else RemoteEvaluator(inner, self.workers)

    def evaluate_many(
        self, llm: SwitchableLLM, masks: Sequence[PruningMask], near: PruningMask | None = None
    ) -> Iterator[tuple[PruningMask, Evaluation]]:
        """As `Evaluator.evaluate_many`; `llm` only tells what the workers' models have to be equal to.

        Raises:
            WorkersFailed: See `Workers.evaluate_many`.
            RapError: What the inner evaluator raised in a worker.
        """
        return self.workers.evaluate_many(self.inner, llm, masks, near)
