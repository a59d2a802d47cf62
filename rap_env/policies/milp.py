"""The policy that solves: the cheapest components to drop, exactly, for the workload and the budget at hand."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from rap_env.errors import InvalidMask
from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask
from rap_env.memory.footprint import check_feasible, component_bytes, dense_bytes
from rap_env.memory.workload import Workload
from rap_env.policies.base import Policy, policy_kind


@policy_kind
class MilpPolicy(Policy):
    """Mixed-integer programming on component costs, as Puzzle chooses blocks (arXiv 2411.19146).

    With x = 1 for what is dropped:

        minimise    sum of costs * x
        subject to  sum of freed bytes * x >= dense bytes - budget,   x in {0, 1}

    This is the optimum if costs add up, which those of single drops do not quite. A component with a negative cost is
    dropped whether or not the budget asks for it: that is the optimum of what was measured.

    Args:
        shape: The model.
        costs: What dropping each component costs, by name.

    Raises:
        InvalidMask: The costs do not name each component of the model.
        ValueError: A cost is not a finite number.
    """

    kind = "milp"

    def __init__(self, shape: ModelShape, costs: Mapping[str, float]) -> None:
        self.shape = shape
        names = [component.name for component in shape.components]
        if set(costs) != set(names):
            raise InvalidMask(f"expected a cost for each of the {len(names)} components; got {len(costs)} others")
        self._costs = np.array([costs[name] for name in names], dtype=float)
        if not np.isfinite(self._costs).all():
            raise ValueError(f"expected finite costs; got {dict(costs)}")

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        check_feasible(self.shape, workload, budget_bytes)
        missing_bytes = max(0, dense_bytes(self.shape, workload) - math.floor(budget_bytes))
        # The solver's tolerances are absolute. In units of their common divisor bytes are small integers, which they
        # can't blur; relative to the largest, costs are far above them.
        freed = np.array(component_bytes(self.shape, workload))
        unit, largest = np.gcd.reduce(freed), np.abs(self._costs).max() or 1.0
        solution = milp(
            self._costs / largest,
            integrality=np.ones_like(freed),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(freed // unit, lb=math.ceil(missing_bytes / unit)),
            options={"mip_rel_gap": 0.0},
        )
        assert solution.success, solution.message
        dropped = solution.x.round().astype(bool)
        assert freed[dropped].sum() >= missing_bytes
        return PruningMask(self.shape.components, tuple((~dropped).tolist()))

    def parameters(self) -> dict[str, Any]:
        names = (component.name for component in self.shape.components)
        return {"costs": dict(zip(names, self._costs.tolist(), strict=True))}
