"""The policy that prices components anew for each workload: the walk along costs for each byte that is freed there."""

import functools
from collections.abc import Mapping
from typing import Any

from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask, full_order
from rap_env.memory.footprint import component_bytes
from rap_env.memory.workload import Workload
from rap_env.policies.base import Policy, policy_kind
from rap_env.policies.walk import fit_to_budget


@policy_kind
class PricedPolicy(Policy):
    """Walks components by cost for each byte that they free at the workload, until the mask fits.

    If costs add up this is the best mask but for what one component leaves over: the greedy solution of a knapsack. A
    site's parts go from the last to the first; where a part is cheaper than one that has to go before it, both go for
    their mean price, as on the lower convex hull of the site's costs over its bytes.

    Args:
        shape: The model.
        costs: What dropping each component costs, by name.

    Raises:
        InvalidMask: The costs do not name each component of the model.
    """

    kind = "priced"

    def __init__(self, shape: ModelShape, costs: Mapping[str, float]) -> None:
        self.shape = shape
        full_order(shape.components, list(costs))
        self._costs = {component.name: float(costs[component.name]) for component in shape.components}
        self._orders = functools.lru_cache(maxsize=256)(self._priced)

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        order = self.order(workload)
        return fit_to_budget(PruningMask.all_kept(self.shape), self.shape, order, workload, budget_bytes)

    def order(self, workload: Workload) -> tuple[str, ...]:
        """All component names, the first to go first at a workload."""
        return self._orders(workload)

    def parameters(self) -> dict[str, Any]:
        return {"costs": self._costs}

    def _priced(self, workload: Workload) -> tuple[str, ...]:
        freed, prices = component_bytes(self.shape, workload), {}
        for _site, own in self.shape.components.sites:
            hull: list[tuple[float, int, list[str]]] = []  # cost, bytes and names of parts that go together
            for position in reversed(range(own.start, own.stop)):
                name = self.shape.components[position].name
                cost, n_bytes, names = self._costs[name], freed[position], [name]
                while hull and cost * hull[-1][1] <= hull[-1][0] * n_bytes:  # no dearer than what has to go before it
                    earlier_cost, earlier_bytes, earlier = hull.pop()
                    cost, n_bytes, names = cost + earlier_cost, n_bytes + earlier_bytes, [*earlier, *names]
                hull.append((cost, n_bytes, names))
            prices |= {name: cost / n_bytes for cost, n_bytes, names in hull for name in names}
        return full_order(self.shape.components, sorted(prices, key=prices.__getitem__))
