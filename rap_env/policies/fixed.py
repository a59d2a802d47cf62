"""Policies without weights: dense, random, and the walk along one order."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask, full_order
from rap_env.memory.workload import Workload
from rap_env.policies.base import policy_kind
from rap_env.policies.walk import fit_to_budget


class _WithoutTensors:
    def tensors(self) -> dict:
        return {}

    @classmethod
    def restore(cls, shape: ModelShape, parameters: Mapping, tensors: Mapping):
        return cls(shape, **parameters)


@policy_kind
class DensePolicy(_WithoutTensors):
    """Keeps everything, whatever the budget: the upper bound of accuracy, and a violation whenever memory is short."""

    kind = "dense"

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        return PruningMask.all_kept(self.shape)

    def parameters(self) -> dict[str, Any]:
        return {}


@policy_kind
class RandomPolicy(_WithoutTensors):
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
        dense = PruningMask.all_kept(self.shape)
        return fit_to_budget(dense, self.shape, [str(name) for name in order], workload, budget_bytes)

    def parameters(self) -> dict[str, Any]:
        return {"seed": self._seed}


@policy_kind
class OrderPolicy(_WithoutTensors):
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
