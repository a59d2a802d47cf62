"""Policies without weights: dense, random, the walk along one order, and one order for each workload."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rap_env.components import ATTENTION
from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask, full_order
from rap_env.memory.workload import Workload
from rap_env.policies.base import Policy, policy_kind
from rap_env.policies.walk import fit_to_budget


@policy_kind
class DensePolicy(Policy):
    """Keeps everything, whatever the budget: the upper bound of accuracy, and a violation whenever memory is short."""

    kind = "dense"

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        return PruningMask.all_kept(self.shape)

    def parameters(self) -> dict[str, Any]:
        return {}


@policy_kind
class RandomPolicy(Policy):
    """Drops components in random order until the model fits; the same scenario always gets the same mask.

    Args:
        shape: The model.
        seed: Seed of the orders.
    """

    kind = "random"

    def __init__(self, shape: ModelShape, seed: int = 0) -> None:
        self.shape = shape
        self._seed = seed
        np.random.SeedSequence([seed])  # refuses what is no seed now, not at the first decision

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        scenario = [self._seed, workload.batch_size, workload.prompt_tokens, workload.generated_tokens]
        names = [component.name for component in self.shape.components]
        order = np.random.default_rng([*scenario, int(budget_bytes)]).permutation(names)
        order = full_order(self.shape.components, [str(name) for name in order])
        return fit_to_budget(PruningMask.all_kept(self.shape), self.shape, order, workload, budget_bytes)

    def parameters(self) -> dict[str, Any]:
        return {"seed": self._seed}


@policy_kind
class OrderPolicy(Policy):
    """Drops components along one order until the model fits, then restores what there is still room for.

    Args:
        shape: The model.
        order: All component names, the first to go first.

    Raises:
        InvalidMask: The order does not name each component of the model once.
    """

    kind = "order"

    def __init__(self, shape: ModelShape, order: Sequence[str]) -> None:
        self.shape = shape
        self._order = full_order(shape.components, order)

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        return fit_to_budget(PruningMask.all_kept(self.shape), self.shape, self._order, workload, budget_bytes)

    def parameters(self) -> dict[str, Any]:
        return {"order": list(self._order)}


def even_order(shape: ModelShape) -> list[str]:
    """An order that needs no measurement: the last parts of all MLPs first, those before them, then KV heads likewise.

    Every layer loses the same share before any loses more, the last layer first.
    """
    places = [
        (component, place / (own.stop - own.start))
        for _site, own in shape.components.sites
        for place, component in enumerate(shape.components[own])
    ]
    places.sort(key=lambda each: (each[0].site.kind == ATTENTION, -each[1], -each[0].site.layer))
    return [component.name for component, _share in places]


@policy_kind
class NearestOrderPolicy(Policy):
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

    @classmethod
    def restore(cls, shape: ModelShape, parameters: Mapping, tensors: Mapping) -> "NearestOrderPolicy":
        return cls(shape, {int(tokens): order for tokens, order in dict(parameters["orders"]).items()})
