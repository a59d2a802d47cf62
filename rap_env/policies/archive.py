"""The policy that remembers: of all masks that were ever evaluated, the best one that fits."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask, full_order
from rap_env.memory.footprint import dense_bytes, smallest_bytes
from rap_env.memory.workload import Workload
from rap_env.policies.base import Policy, policy_kind
from rap_env.policies.walk import fit_to_budget


@policy_kind
class ArchivePolicy(Policy):
    """A Pareto front over (weight bytes, KV bytes per token, score) with a lookup.

    A mask's score does not depend on the workload, and its bytes do through these two sums alone. So a mask is
    remembered only if none that needs no more of either scores as high. With room for everything, everything is kept.

    Args:
        shape: The model.
        evaluated: Masks with their scores.
        order: All component names, the first to go first; serves the budgets that no entry fits, as `OrderPolicy` does.
        fill: Whether what an entry leaves over is used too: dropped components come back along the order, the last
            first. Budgets that no entry fits are then served by what needs least, with further components dropped.

    Raises:
        InvalidMask: A mask belongs to another model, or the order does not name each component once.
    """

    kind = "archive"

    def __init__(
        self,
        shape: ModelShape,
        evaluated: Iterable[tuple[PruningMask, float]],
        order: Sequence[str],
        fill: bool = False,
    ) -> None:
        self.shape, self._fill = shape, fill
        self._order = full_order(shape.components, order)
        self._entries = _pareto_front(evaluated)

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        dense = PruningMask.all_kept(self.shape)
        if dense_bytes(self.shape, workload) <= budget_bytes:
            return dense
        smallest, tokens = smallest_bytes(self.shape, workload), workload.cached_tokens(self.shape.attention_window)
        start, least_bytes = dense, math.inf
        for (mask, _score), (weights, kv) in self._entries.items():  # the highest score first
            needed = smallest + weights + kv * tokens
            if needed <= budget_bytes:
                if not self._fill:
                    return mask
                start = mask
                break
            if self._fill and needed < least_bytes:
                start, least_bytes = mask, needed
        return fit_to_budget(start, self.shape, self._order, workload, budget_bytes)

    def parameters(self) -> dict[str, Any]:
        entries = [[[component.name for component in mask.dropped], score] for mask, score in self._entries]
        return {"entries": entries, "order": list(self._order), "fill": self._fill}

    @classmethod
    def restore(cls, shape: ModelShape, parameters: Mapping, tensors: Mapping) -> "ArchivePolicy":
        dense = PruningMask.all_kept(shape)
        evaluated = [(dense.drop(*dropped), score) for dropped, score in parameters["entries"]]
        return cls(shape, evaluated, parameters["order"], parameters.get("fill", False))


def _pareto_front(evaluated: Iterable[tuple[PruningMask, float]]) -> dict[tuple[PruningMask, float], tuple[int, int]]:
    """Masks that are better than all that need no more of either sum, the best first, with these sums."""
    costs = {}
    for mask, score in evaluated:
        costs[mask, score] = mask.weight_bytes, mask.kv_bytes_per_token
    front: dict[tuple[PruningMask, float], tuple[int, int]] = {}
    for entry in sorted(costs, key=lambda entry: (-entry[1], costs[entry], entry[0].digest)):
        weights, kv = costs[entry]
        if not any(less <= weights and fewer <= kv for less, fewer in front.values()):
            front[entry] = weights, kv
    return front
