"""The policy that solves: the cheapest components to drop, exactly, for the workload and the budget at hand."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from rap_env.components import Components
from rap_env.errors import InvalidMask
from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask
from rap_env.memory.footprint import check_feasible, component_bytes, dense_bytes
from rap_env.memory.workload import Workload
from rap_env.policies.base import Policy, policy_kind

_GAP = 1e-3  # relative, where sites have parts


@policy_kind
class MilpPolicy(Policy):
    """Mixed-integer programming on component costs, as Puzzle chooses blocks (arXiv 2411.19146).

    With x = 1 for what is dropped:

        minimise    sum of costs * x
        subject to  sum of freed bytes * x >= dense bytes - budget,   x in {0, 1}
                    x of a part <= x of the next part of its site

    This is the optimum if costs add up, which those of single drops do not quite. A component with a negative cost is
    dropped whether or not the budget asks for it: that is the optimum of what was measured. Where sites have parts it
    is the optimum but for a thousandth of the costs, which takes a tenth of the time.

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
        self._nesting = _nesting(shape.components)
        self._gap = _GAP if self._nesting.shape[0] else 0.0
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
            constraints=[
                LinearConstraint(freed // unit, lb=math.ceil(missing_bytes / unit)),
                *([LinearConstraint(self._nesting, ub=0.0)] if self._nesting.shape[0] else []),
            ],
            options={"mip_rel_gap": self._gap},
        )
        assert solution.success, solution.message
        dropped = solution.x.round().astype(bool)
        assert freed[dropped].sum() >= missing_bytes
        return PruningMask(self.shape.components, tuple((~dropped).tolist()))

    def parameters(self) -> dict[str, Any]:
        names = (component.name for component in self.shape.components)
        return {"costs": dict(zip(names, self._costs.tolist(), strict=True))}


def _nesting(components: Components) -> csr_array:
    """Rows [pairs, n] that are positive where a part is dropped and the next one of its site is not."""
    first = [i for _site, own in components.sites for i in range(own.start, own.stop - 1)]
    rows, ones = np.arange(len(first)).repeat(2), np.tile([1.0, -1.0], len(first))
    columns = np.stack([first, np.add(first, 1)], axis=1).ravel() if first else np.array([], dtype=int)
    return csr_array((ones, (rows, columns)), shape=(len(first), len(components)))
