"""The policy that remembers: of all masks that were ever judged, the best one that fits."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rap_env.llm.architecture import ModelShape
from rap_env.mask import PruningMask, full_order
from rap_env.memory.footprint import dense_bytes, footprint
from rap_env.memory.workload import Workload
from rap_env.policies.base import policy_kind
from rap_env.policies.walk import fit_to_budget


@policy_kind
class ArchivePolicy:
    """A Pareto archive with a lookup: (workload, budget) to the best judged mask that fits.

    A mask's score does not depend on the workload and its bytes do, through the number of attentions and of MLPs that
    it keeps. So one mask is remembered for each pair of these numbers, and only if no mask that keeps fewer of both has
    a higher score: at most (layers + 1)^2 entries, whatever was judged. With room for everything, everything is kept.

    Args:
        shape: The model.
        judged: Masks with their scores.
        order: All component names, the first to go first; serves the budgets that no entry fits, as `OrderPolicy` does.

    Raises:
        InvalidMask: A mask belongs to another model, or the order does not name each component once.
    """

    kind = "archive"

    def __init__(self, shape: ModelShape, judged: Iterable[tuple[PruningMask, float]], order: Sequence[str]) -> None:
        self.shape = shape
        self._order = full_order(shape.components, order)
        self._entries = _undominated(judged)

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        dense = PruningMask.all_kept(self.shape)
        if dense_bytes(self.shape, workload) <= budget_bytes:
            return dense
        for mask, _score in self._entries:  # the highest score first
            if footprint(self.shape, mask, workload).peak_bytes <= budget_bytes:
                return mask
        return fit_to_budget(dense, self.shape, self._order, workload, budget_bytes)

    def parameters(self) -> dict[str, Any]:
        entries = [[[component.name for component in mask.dropped], score] for mask, score in self._entries]
        return {"entries": entries, "order": list(self._order)}

    def tensors(self) -> dict:
        return {}

    @classmethod
    def restore(cls, shape: ModelShape, parameters: Mapping, tensors: Mapping) -> "ArchivePolicy":
        dense = PruningMask.all_kept(shape)
        judged = [(dense.drop(*dropped), score) for dropped, score in parameters["entries"]]
        return cls(shape, judged, parameters["order"])


def _kept_of_each_kind(mask: PruningMask) -> tuple[int, int]:
    kept = [component.kind for component in mask.kept]
    return kept.count("attention"), kept.count("mlp")


def _undominated(judged: Iterable[tuple[PruningMask, float]]) -> list[tuple[PruningMask, float]]:
    """Masks that are better than all that keep no more of either kind, the best first."""
    front: list[tuple[PruningMask, float, tuple[int, int]]] = []
    ranked = [(mask, score, _kept_of_each_kind(mask)) for mask, score in judged]
    for mask, score, kept in sorted(ranked, key=lambda entry: (-entry[1], sum(entry[2]), entry[0].digest)):
        if not any(other[0] <= kept[0] and other[1] <= kept[1] for _mask, _score, other in front):
            front.append((mask, score, kept))
    return [(mask, score) for mask, score, _kept in front]
