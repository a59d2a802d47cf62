"""Scenarios: which workload meets which memory budget."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rap_env.errors import InvalidWorkload
from rap_env.memory.footprint import check_feasible, dense_bytes
from rap_env.memory.workload import Workload

_AXES = ("batch_size", "prompt_tokens", "budget_ratio")
_ROUNDING = 1e-6  # of a budget ratio, by rounding budgets down to whole bytes


@dataclass(frozen=True)
class Scenario:
    """A request batch and the bytes that weights and KV cache may take for it."""

    workload: Workload
    budget_bytes: int

    @classmethod
    def from_ratio(cls, shape, workload: Workload, budget_ratio: float) -> "Scenario":
        """A budget as a fraction of the dense footprint for the same workload.

        Raises:
            InfeasibleBudget: No mask can meet it, or it is NaN.
            InvalidWorkload: The workload is beyond the model's context.
        """
        budget_bytes = budget_ratio * dense_bytes(shape, workload) // 1  # whole bytes; NaN stays NaN, and is refused
        check_feasible(shape, workload, budget_bytes)
        return cls(workload, int(budget_bytes))


class ScenarioSampler:
    """Draws scenarios: batch size and prompt length log-uniformly, budget ratio and kind of text uniformly.

    Args:
        batch_size: Smallest and largest number of sequences.
        prompt_tokens: Smallest and largest length.
        budget_ratio: Smallest and largest budget, as a fraction of the dense footprint.
        generated_tokens: Tokens that each sequence grows by.
        kinds: Kinds of text that workloads are of; none leaves it open.

    Attributes:
        kinds: The same.

    Raises:
        InvalidWorkload: A range is empty, or a number in it is not positive, or a kind stands there twice.
    """

    def __init__(
        self,
        batch_size: Sequence[int] = (1, 16),
        prompt_tokens: Sequence[int] = (128, 2048),
        budget_ratio: Sequence[float] = (0.6, 0.95),
        generated_tokens: int = 0,
        kinds: Sequence[str] = (),
    ) -> None:
        ranges = dict(zip(_AXES, (batch_size, prompt_tokens, budget_ratio), strict=True))
        for name, (low, high) in ranges.items():
            if not 0 < low <= high < math.inf:
                raise InvalidWorkload(f"{name}: expected 0 < smallest <= largest; got {low} and {high}")
        self._batch_size, self._prompt_tokens, self._budget_ratio = map(tuple, ranges.values())
        self._generated_tokens, self.kinds = generated_tokens, tuple(kinds)
        if len(set(self.kinds)) < len(self.kinds):
            raise InvalidWorkload(f"kinds: expected each once; got {', '.join(self.kinds)}")

    @property
    def n_dimensions(self) -> int:
        """Of the unit cube that scenarios are drawn from."""
        return len(_AXES) + bool(self.kinds)

    def check(self, shape) -> None:
        """Refuses ranges with a corner that a model can't serve, before any work is done.

        Raises:
            InfeasibleBudget: The smallest budget ratio can't be met at some corner.
            InvalidWorkload: The longest sequences are beyond the model's context.
        """
        corners = list(itertools.product(self._batch_size, self._prompt_tokens))
        scenario_grid(shape, corners, self._budget_ratio[:1], self._generated_tokens)

    def sample(self, shape, generator: np.random.Generator) -> Scenario:
        """Draws one scenario for a model."""
        return self.at(shape, generator.random(self.n_dimensions).tolist())

    def at(self, shape, point: Sequence[float]) -> Scenario:
        """The scenario at a point of the unit cube: batch size, prompt length, budget ratio, and kind if there are any.

        Raises:
            InfeasibleBudget: No mask can meet its budget.
            InvalidWorkload: Its sequences are beyond the model's context.
        """

        def between(low: float, high: float, part: float) -> float:
            return low + (high - low) * part

        batch_size, prompt_tokens = (
            round(math.exp(between(*map(math.log, bounds), part)))
            for bounds, part in zip((self._batch_size, self._prompt_tokens), point[:2], strict=True)
        )
        kind = self.kinds[min(int(point[3] * len(self.kinds)), len(self.kinds) - 1)] if self.kinds else ""
        workload = Workload(batch_size, prompt_tokens, self._generated_tokens, kind)
        return Scenario.from_ratio(shape, workload, float(between(*self._budget_ratio, point[2])))

    def covers(self, batch_size: int, prompt_tokens: int, budget_ratio: float) -> bool:
        """Whether a context lies within all three ranges; a budget may be short of its range by what rounding took."""
        inside = zip((batch_size, prompt_tokens), (self._batch_size, self._prompt_tokens), strict=True)
        low, high = self._budget_ratio
        return all(small <= value <= large for value, (small, large) in inside) and (
            low - _ROUNDING <= budget_ratio <= high
        )


def scenario_grid(
    shape, workloads: Sequence[Sequence[int]], budget_ratios: Sequence[float], generated_tokens: int = 0
) -> list[Scenario]:
    """Every workload (batch size, prompt tokens) with every budget ratio, for reports."""
    return [
        Scenario.from_ratio(shape, Workload(batch_size, prompt_tokens, generated_tokens), ratio)
        for batch_size, prompt_tokens in workloads
        for ratio in budget_ratios
    ]
