"""From an order of components to a pruning mask that fits."""

from collections.abc import Iterable

from rap_env.errors import InfeasibleBudget
from rap_env.mask import PruningMask
from rap_env.memory.footprint import component_bytes, footprint
from rap_env.memory.workload import Workload


def drop_until_fits(shape, order: Iterable[str], workload: Workload, budget_bytes: int) -> PruningMask:
    """Drops components in order, from the dense model, until the footprint is within the budget.

    Args:
        shape: The model's `ModelShape`.
        order: Component names, the first to go first.
        workload: The request batch.
        budget_bytes: Bytes that weights and KV cache may take.

    Raises:
        InfeasibleBudget: Dropping the whole order is not enough.
    """
    mask = PruningMask.all_kept(shape)
    peak_bytes = footprint(shape, mask, workload).peak_bytes
    freed = component_bytes(shape, workload)
    victims = []
    for name in order:
        if peak_bytes <= budget_bytes:
            break
        victims.append(name)
        peak_bytes -= freed[mask.position(name)]
    if peak_bytes > budget_bytes:
        raise InfeasibleBudget(budget_bytes, peak_bytes, workload)
    return mask.drop(*victims)
