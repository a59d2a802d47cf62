"""One policy of each kind, over the tiny model."""

import torch

from rap_env.memory.projection import Projection
from rap_env.policies import (
    ArchivePolicy,
    DensePolicy,
    KindsPolicy,
    MilpPolicy,
    NearestOrderPolicy,
    OneStepPolicy,
    OrderPolicy,
    PricedPolicy,
    RandomPolicy,
    SequentialPolicy,
    WidthPolicy,
)
from rap_env.policies.network import ComponentNetwork
from rap_env.policies.width import WidthNetwork
from rap_env.rng import isolated_rng
from tests.policies.test_archive import evaluated_masks

ORDER = [f"layer{i}.{kind}" for i in (2, 0, 3, 1) for kind in ("mlp", "attention")]
COSTS = {name: 0.5**rank for rank, name in enumerate(ORDER)}


def random_network(shape, sequential: bool, seed: int = 0) -> ComponentNetwork:
    """A network that cares about everything it sees; a fresh one would score all components alike."""
    with isolated_rng(seed):
        network = ComponentNetwork(shape, sequential, width=16)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return network


def random_width_network(shape, seed: int = 0) -> WidthNetwork:
    """A network whose widths differ from site to site and from scenario to scenario."""
    with isolated_rng(seed):
        network = WidthNetwork(len(shape.components.sites), layers=(16, 16))
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return network


MAKERS = {
    "dense": DensePolicy,
    "random": lambda shape: RandomPolicy(shape, seed=5),
    "order": lambda shape: OrderPolicy(shape, ORDER),
    "one_step_network": lambda shape: OneStepPolicy(shape, random_network(shape, False), ORDER),
    "archive": lambda shape: ArchivePolicy(shape, evaluated_masks(shape), ORDER),
    "milp": lambda shape: MilpPolicy(shape, COSTS),
    "priced": lambda shape: PricedPolicy(shape, COSTS),
    "by_kind": lambda shape: KindsPolicy(shape, {"": PricedPolicy(shape, COSTS), "code": OrderPolicy(shape, ORDER)}),
    "nearest_order": lambda shape: NearestOrderPolicy(shape, {64: ORDER, 4096: ORDER[::-1]}),
    "width": lambda shape: WidthPolicy(shape, random_width_network(shape), Projection()),
    "width_nested": lambda shape: WidthPolicy(shape, random_width_network(shape), Projection("nested")),
    "sequential_network": lambda shape: SequentialPolicy(shape, random_network(shape, True), ORDER),
}
