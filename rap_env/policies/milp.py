"""The policy that solves: the cheapest components to drop, exactly, for the workload and the budget at hand."""

import itertools
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

_DIGITS = 12  # of costs relative to the largest: parts between two points of a curve differ by rounding alone


@policy_kind
class MilpPolicy(Policy):
    """Mixed-integer programming on component costs, as Puzzle chooses blocks (arXiv 2411.19146).

    With x the dropped parts among those of a run, n neighbours of equal costs in a site, and y = 1 for a run all of
    which is dropped:

        minimise    sum of costs * x
        subject to  sum of freed bytes * x >= dense bytes - budget,   x in {0, ..., n},   y in {0, 1}
                    x >= n y,   x of the run in front <= n of that run * y

    This is the optimum if costs add up, which those of single drops do not quite. A component with a negative cost is
    dropped whether or not the budget asks for it: that is the optimum of what was measured. Parts of a site go last
    ones first. Where none in front costs less than one behind it, that comes of itself and no y is needed, for none in
    front has more bytes.

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
        # Relative to the largest they are far above the solver's tolerances, which are absolute.
        scaled = (self._costs / (np.abs(self._costs).max() or 1.0)).round(_DIGITS)
        self._runs = [_runs(shape.components, scaled, own) for _site, own in shape.components.sites]
        self._nesting = _nesting(scaled, self._runs)
        of_runs = list(itertools.chain(*self._runs))
        self._first, self._n_filled = [run[0] for run in of_runs], self._nesting.shape[1] - len(of_runs)
        self._objective = self._with_filled(scaled[self._first], 0)
        self._bounds = Bounds(0, self._with_filled(np.array([len(run) for run in of_runs]), 1))

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        check_feasible(self.shape, workload, budget_bytes)
        missing_bytes = max(0, dense_bytes(self.shape, workload) - math.floor(budget_bytes))
        freed = np.array(component_bytes(self.shape, workload))
        unit = np.gcd.reduce(freed)  # in this unit bytes are small integers, which the solver's tolerances can't blur
        in_units = self._with_filled(freed[self._first] // unit, 0)
        solution = milp(
            self._objective,
            integrality=np.ones_like(in_units),
            bounds=self._bounds,
            constraints=[
                LinearConstraint(in_units, lb=math.ceil(missing_bytes / unit)),
                *([LinearConstraint(self._nesting, ub=0.0)] if self._n_filled else []),
            ],
            options={"mip_rel_gap": 0.0},
        )
        assert solution.success, solution.message
        n_dropped, kept = iter(solution.x.round().astype(int).tolist()), np.ones(len(freed), dtype=bool)
        for (_site, own), runs in zip(self.shape.components.sites, self._runs, strict=True):
            kept[own.stop - sum(next(n_dropped) for _run in runs) : own.stop] = False
        assert freed[~kept].sum() >= missing_bytes
        return PruningMask(self.shape.components, tuple(kept.tolist()))

    def _with_filled(self, of_runs: np.ndarray, value: int) -> np.ndarray:
        """Values of the x, and the same one for all y."""
        return np.append(of_runs, np.full(self._n_filled, value))

    def parameters(self) -> dict[str, Any]:
        names = (component.name for component in self.shape.components)
        return {"costs": dict(zip(names, self._costs.tolist(), strict=True))}


def _runs(components: Components, costs: np.ndarray, own: slice) -> list[list[int]]:
    """Places of a site's parts from the last to the first, cut where the next one differs in costs or bytes."""

    def of(place: int) -> tuple:
        row = components[place]
        return costs[place], row.weight_bytes, row.kv_bytes_per_token

    return [list(run) for _of, run in itertools.groupby(range(own.stop - 1, own.start - 1, -1), key=of)]


def _nesting(costs: np.ndarray, runs: list[list[list[int]]]) -> csr_array:
    """Rows that are positive where a run is begun before the one behind it is dropped: one column a run, then the y."""
    pairs, n_runs = [], 0  # of two neighbours: the number of the one behind, and both sizes
    for of_site in runs:
        of_run = costs[[run[0] for run in of_site]]
        for place, (behind, front) in enumerate(itertools.pairwise(of_site)):
            if of_run[: place + 1].max() > of_run[place + 1 :].min():
                pairs.append((n_runs + place, len(behind), len(front)))
        n_runs += len(of_site)
    rows = np.zeros((2 * len(pairs), n_runs + len(pairs)))
    for pair, (behind, n_behind, n_front) in enumerate(pairs):
        rows[2 * pair, [behind, n_runs + pair]] = -1.0, n_behind
        rows[2 * pair + 1, [behind + 1, n_runs + pair]] = 1.0, -n_front
    return csr_array(rows)
