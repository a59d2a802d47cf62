"""What a request may spend: layers that are run, and documents that are in memory."""

import math
from dataclasses import dataclass

from rap_env.errors import RankingFailed


@dataclass(frozen=True)
class Budgets:
    """Limits of one request; a request that would go beyond one ends with the best by the scores it has.

    Attributes:
        compute: Candidates that are run, summed over layers, over all candidates times all layers.
        memory: Candidates whose streams are in memory from the second layer on, over all candidates.

    Raises:
        RankingFailed: One is not above 0.
    """

    compute: float = math.inf
    memory: float = math.inf

    def __post_init__(self) -> None:
        if not (self.compute > 0 and self.memory > 0):
            raise RankingFailed(f"expected budgets above 0; got compute={self.compute}, memory={self.memory}")

    def left(self, spent: float, live: float) -> tuple[float, float]:
        """Shares of the budgets for compute and memory that are left, 1 where there is no limit, 0 where it is reached.

        Args:
            spent: What was run, as `compute` counts.
            live: Candidates that are read on, as `memory` counts.
        """
        return max(0.0, 1.0 - spent / self.compute), max(0.0, 1.0 - live / self.memory)

    def allow(self, spent: float, live: float) -> bool:
        """Whether so much is within them."""
        slack = 1e-9  # of sums of shares
        return spent <= self.compute + slack and live <= self.memory + slack


UNLIMITED = Budgets()
