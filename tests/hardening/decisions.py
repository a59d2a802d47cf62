"""Random policies of every kind decide random scenarios; how many of their masks need more than the budget."""

import random
from collections.abc import Callable, Mapping

import numpy as np

from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask
from rap_env.memory.footprint import dense_bytes, footprint, smallest_bytes
from rap_env.memory.projection import Projection
from rap_env.memory.workload import Workload
from rap_env.policies import (
    ArchivePolicy,
    MilpPolicy,
    NearestOrderPolicy,
    OneStepPolicy,
    OrderPolicy,
    PricedPolicy,
    RandomPolicy,
    SequentialPolicy,
    WidthPolicy,
)
from rap_env.policies.base import Policy
from tests.policies.cases import random_network, random_width_network


def _names(shape: ModelShape, seed: int) -> list[str]:
    names = [component.name for component in shape.components]
    random.Random(seed).shuffle(names)
    return names


def _costs(shape: ModelShape, seed: int) -> dict[str, float]:
    rng = random.Random(seed)
    return {name: rng.uniform(-0.1, 1.0) ** 3 for name in _names(shape, seed)}


def _archive(shape: ModelShape, seed: int, fill: bool) -> ArchivePolicy:
    rng = np.random.default_rng(seed)
    bits = rng.random((40, len(shape.components))) < rng.random((40, 1))
    entries = [(PruningMask.from_bits(shape, row), float(rng.random())) for row in bits]
    return ArchivePolicy(shape, entries, _names(shape, seed), fill)


# All but "dense", which keeps everything whatever the budget: that is what it is for.
POLICIES: Mapping[str, Callable[[ModelShape, int], Policy]] = {
    "random": RandomPolicy,
    "order": lambda shape, seed: OrderPolicy(shape, _names(shape, seed)),
    "nearest_order": lambda shape, seed: NearestOrderPolicy(
        shape, {64: _names(shape, seed), 4096: _names(shape, seed + 1)}
    ),
    "archive": lambda shape, seed: _archive(shape, seed, fill=False),
    "archive, filled": lambda shape, seed: _archive(shape, seed, fill=True),
    "milp": lambda shape, seed: MilpPolicy(shape, _costs(shape, seed)),
    "priced": lambda shape, seed: PricedPolicy(shape, _costs(shape, seed)),
    "one_step_network": lambda shape, seed: OneStepPolicy(
        shape, random_network(shape, False, seed), _names(shape, seed)
    ),
    "sequential_network": lambda shape, seed: SequentialPolicy(
        shape, random_network(shape, True, seed), _names(shape, seed)
    ),
    "width": lambda shape, seed: WidthPolicy(shape, random_width_network(shape, seed), Projection()),
    "width, nested": lambda shape, seed: WidthPolicy(shape, random_width_network(shape, seed), Projection("nested")),
    "width, affine": lambda shape, seed: WidthPolicy(
        shape, random_width_network(shape, seed), Projection(reading="affine")
    ),
}
_PER_POLICY = 100  # decisions, before another one of its kind is made


def random_scenario(shape: ModelShape, rng: random.Random) -> tuple[Workload, int]:
    """A workload of any size that the model takes, and a budget that some mask meets, the narrowest ones included."""
    prompt = int(2 ** rng.uniform(0, np.log2(shape.context_tokens - 1)))
    generated = rng.randint(0, min(512, shape.context_tokens - prompt))
    workload = Workload(int(2 ** rng.uniform(0, 7)), prompt, generated)
    smallest, dense = smallest_bytes(shape, workload), dense_bytes(shape, workload)
    budget_bytes = rng.choice([smallest, smallest + 1, dense - 1, dense, rng.randint(smallest, dense + dense // 10)])
    return workload, max(smallest, rng.choice([budget_bytes, rng.randint(smallest, dense)]))


def over_budget(kind: str, shape: ModelShape, n_decisions: int, seed: int = 0) -> list[str]:
    """The decisions that need more than they may, in words.

    Args:
        kind: Of the policies.
        shape: The model.
        n_decisions: How many.
        seed: Of policies and scenarios.
    """
    rng, over = random.Random(f"{kind} {seed}"), []
    for number in range(n_decisions):
        if number % _PER_POLICY == 0:
            policy = POLICIES[kind](shape, seed + number // _PER_POLICY)
        workload, budget_bytes = random_scenario(shape, rng)
        needed = footprint(shape, policy.decide(workload, budget_bytes), workload).peak_bytes
        if needed > budget_bytes:
            over.append(f"{kind}, decision {number}: {workload} needs {needed:,} of {budget_bytes:,} bytes")
    return over
