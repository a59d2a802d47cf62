"""What every evaluator is: it judges masked models, many at once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask


@dataclass(frozen=True)
class Evaluation:
    """How good a model is. Equality ignores the time it took.

    Attributes:
        score: The one number that searches compare; higher is better.
        tasks: For each task its metrics by name, and `items`, the number of items behind them.
        tokens: Tokens that were forwarded.
        seconds: Wall-clock time; of several that were judged at once, the time since the one before.
    """

    score: float
    tasks: Mapping[str, Mapping[str, float]]
    tokens: int = field(compare=False)
    seconds: float = field(compare=False)

    def mean(self, metric: str) -> float:
        """Mean of a metric over the tasks that have it, each task counting once; NaN where none has."""
        values = [metrics[metric] for metrics in self.tasks.values() if metric in metrics]
        return sum(values) / len(values) if values else float("nan")


class Evaluator(Protocol):
    """Judges masked models; deterministic, so that its results may be stored."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything a result depends on besides the model: items, metric, library versions."""

    def evaluate_many(
        self, llm: SwitchableLLM, masks: Sequence[PruningMask]
    ) -> Iterator[tuple[PruningMask, Evaluation]]:
        """Judges distinct masks, whatever mask is applied; each is yielded as soon as it is finished, in any order."""

    def peak_bytes(self, llm: SwitchableLLM, n_masks: int = 1) -> int:
        """Predicted peak of what judging takes beside the weights, when so many masks are judged together."""

    def evaluate(self, llm: SwitchableLLM) -> Evaluation:
        """Judges the model with the mask that is applied."""
        return next(iter(self.evaluate_many(llm, [llm.mask])))[1]
