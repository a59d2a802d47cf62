"""The policy with an order for each workload: the nearest one serves a workload that none was measured for."""

from collections.abc import Mapping, Sequence
from typing import Any

from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask, full_order
from rap_env.memory.workload import Workload
from rap_env.policies.base import policy_kind
from rap_env.policies.walk import fit_to_budget


@policy_kind
class NearestOrderPolicy:
    """Walks the order that was measured for the nearest number of cached tokens, as `OrderPolicy` walks its only one.

    What components free depends on a workload through its cached tokens alone, and the KV cache grows in proportion to
    them, so "near" is meant by ratio: in the logarithm. Of two equally near ones the smaller serves.

    Args:
        shape: The model.
        orders: For each number of cached tokens all component names, the first to go first.

    Raises:
        InvalidMask: An order does not name each component of the model once.
        ValueError: There is no order, or one for less than 1 token.
    """

    kind = "nearest_order"

    def __init__(self, shape: ModelShape, orders: Mapping[int, Sequence[str]]) -> None:
        if not orders or min(orders) < 1:
            raise ValueError(f"expected orders for one or more numbers of tokens, at least 1; got {sorted(orders)}")
        self.shape = shape
        self._orders = {tokens: full_order(shape.components, orders[tokens]) for tokens in sorted(orders)}

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        asked = workload.cached_tokens(self.shape.attention_window)
        nearest = min(self._orders, key=lambda tokens: max(tokens, asked) / min(tokens, asked))
        dense = PruningMask.all_kept(self.shape)
        return fit_to_budget(dense, self.shape, self._orders[nearest], workload, budget_bytes)

    def parameters(self) -> dict[str, Any]:
        return {"orders": {str(tokens): list(order) for tokens, order in self._orders.items()}}

    def tensors(self) -> dict:
        return {}

    @classmethod
    def restore(cls, shape: ModelShape, parameters: Mapping, tensors: Mapping) -> "NearestOrderPolicy":
        return cls(shape, {int(tokens): order for tokens, order in dict(parameters["orders"]).items()})
