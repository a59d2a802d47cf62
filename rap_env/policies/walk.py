"""From wishes to a pruning mask that fits: the walk along an importance order."""

from collections.abc import Sequence

from rap_env.errors import InfeasibleBudget
from rap_env.mask import PruningMask
from rap_env.memory.footprint import bytes_by_name, footprint
from rap_env.memory.workload import Workload


def fit_to_budget(mask: PruningMask, shape, order: Sequence[str], workload: Workload, budget_bytes: int) -> PruningMask:
    """Drops components along an order until the footprint fits, then restores whatever there is room for.

    From the dense mask this is greedy pruning; from an agent's mask it is a projection onto the masks that fit, as in
    FastForward (arXiv 2511.18977). The walk ends as soon as the mask fits, so bytes may be left over: the dropped
    components come back from the most important down, each if it fits. What is kept of a site are its first parts.

    Args:
        mask: Where the walk starts.
        shape: The model's `ModelShape`.
        order: All component names, the first to go first, of each site the last part first; see `full_order`.
        workload: The request batch.
        budget_bytes: Bytes that weights and KV cache may take.

    Raises:
        InfeasibleBudget: Dropping the whole order is not enough.
    """
    mask = mask.nested
    free_bytes = budget_bytes - footprint(shape, mask, workload).peak_bytes
    freed = bytes_by_name(shape, workload)
    kept = {component.name for component in mask.kept}
    for name in order:
        if free_bytes >= 0:
            break
        if name in kept:
            kept.remove(name)
            free_bytes += freed[name]
    if free_bytes < 0:
        raise InfeasibleBudget(budget_bytes, budget_bytes - free_bytes, workload)
    for name in reversed(order):
        if name not in kept and freed[name] <= free_bytes:
            kept.add(name)
            free_bytes -= freed[name]
    return PruningMask(mask.components, tuple(component.name in kept for component in mask.components))
