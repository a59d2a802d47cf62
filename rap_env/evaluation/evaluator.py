"""What every evaluator is: it scores masked models, many at once."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from rap_env.errors import EvaluationFailed
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask


def check_finite(what: str, values: Iterable[float], llm: SwitchableLLM) -> None:
    """Refuses what no one may compare or store.

    Raises:
        EvaluationFailed: One of the values, measured on the model, is NaN or infinite.
    """
    for value in values:
        if not math.isfinite(value):
            advice = "a weight is not finite, or too large"
            if llm.dtype == torch.float16:
                advice = "activations overflow in float16; load the model with dtype=bfloat16 or float32"
            raise EvaluationFailed(f"the {what} is {value} in {llm.dtype}, not a finite number: {advice}")


@dataclass(frozen=True)
class Evaluation:
    """How good a model is. Equality ignores what it cost.

    Attributes:
        score: The one number that searches compare; higher is better.
        tasks: For each task its metrics by name, and `items`, the number of items behind them.
        tokens: Tokens that were forwarded.
        seconds: Wall-clock time when it was measured; of several that were evaluated at once, the time since the one
            before.
    """

    score: float
    tasks: Mapping[str, Mapping[str, float]]
    tokens: int = field(compare=False)
    seconds: float = field(compare=False)

    def of(self, kind: str) -> "Evaluation":
        """The part of it that is about one kind of text, of an evaluator that tells kinds apart (`Evaluator.kinds`)."""
        prefix = f"{kind}: "
        own = {name.removeprefix(prefix): metrics for name, metrics in self.tasks.items() if name.startswith(prefix)}
        return Evaluation(self.tasks[kind]["score"], own, self.tokens, self.seconds)

    def mean(self, metric: str) -> float:
        """Mean of a metric over the tasks that have it, each task counting once; NaN where none has."""
        values = [metrics[metric] for metrics in self.tasks.values() if metric in metrics]
        return sum(values) / len(values) if values else float("nan")


class Evaluator(Protocol):
    """Scores masked models; deterministic, so that its results may be stored.

    Attributes:
        name: What reports call it.
        setup_tokens: Tokens that it forwards once, before its first evaluation of a model.
        runs_model: Whether it forwards anything; else what it is given may be the model of a table.
        kinds: Kinds of text that it tells apart: for a workload of one of them that part of an evaluation counts.
    """

    name: str
    setup_tokens: int = 0
    runs_model: bool = True
    kinds: Sequence[str] = ()

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a result depends on besides model, mask, machine and engine: kind and name, the items, the metric."""

    def tokens(self, llm: SwitchableLLM) -> int:
        """Tokens that evaluating one mask forwards."""

    def evaluate_many(
        self, llm: SwitchableLLM, masks: Sequence[PruningMask], near: PruningMask | None = None
    ) -> Iterator[tuple[PruningMask, Evaluation]]:
        """Evaluates distinct masks, whatever mask is applied; each is yielded as soon as it is finished, in any order.

        Args:
            llm: The model.
            masks: What it is evaluated with.
            near: A mask that these and those of coming calls differ little from: what it has in common with them in
                front may be kept until the next call.
        """

    def first(self, fraction: float) -> "Evaluator":
        """An evaluator like this one on the first part of its data, rounded up; itself where it can't be cut.

        Args:
            fraction: Above 0 and at most 1.
        """
        return self

    def right_answers(self, llm: SwitchableLLM) -> Sequence[tuple[Sequence[int], Sequence[int]]]:
        """Tokens of context and first right choice of every item that has one; nothing where there are no items."""
        return ()

    def evaluate(self, llm: SwitchableLLM) -> Evaluation:
        """Evaluates the model with the mask that is applied."""
        return next(iter(self.evaluate_many(llm, [llm.mask])))[1]
