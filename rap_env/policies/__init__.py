"""What agents end as: policies that map (workload, budget) to a pruning mask."""

from rap_env.policies.archive import ArchivePolicy
from rap_env.policies.base import Policy, load_policy, save_policy
from rap_env.policies.by_kind import KindsPolicy
from rap_env.policies.fixed import DensePolicy, NearestOrderPolicy, OrderPolicy, RandomPolicy, even_order
from rap_env.policies.learned import OneStepPolicy, SequentialPolicy
from rap_env.policies.milp import MilpPolicy
from rap_env.policies.priced import PricedPolicy
from rap_env.policies.width import WidthPolicy

__all__ = [
    "ArchivePolicy",
    "DensePolicy",
    "KindsPolicy",
    "MilpPolicy",
    "NearestOrderPolicy",
    "OneStepPolicy",
    "OrderPolicy",
    "Policy",
    "PricedPolicy",
    "RandomPolicy",
    "SequentialPolicy",
    "WidthPolicy",
    "even_order",
    "load_policy",
    "save_policy",
]
