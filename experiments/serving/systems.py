"""The systems that a replay compares: who decides on masks, in which number formats."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rap_env.components import ATTENTION, MLP
from rap_env.errors import InfeasibleBudget, check_known
from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.scenario import Scenario
from rap_env.memory.workload import Workload
from rap_env.policies import DensePolicy, Policy, PricedPolicy, load_policy
from rap_env.serving.coarse import CoarseWidths
from rap_env.serving.controller import Decider

_NEVER = 1e12  # nats for a component that is not to be dropped


@dataclass(frozen=True)
class System:
    """One way of serving.

    Attributes:
        decides: `"dense"`: nothing is ever dropped. `"static"`: one mask all the time, the one of the greedy policy for
            the lowest memory. Else the name of a policy, `"greedy"` or one of those that are given as folders.
        only: Kind of site that may be dropped; None for both.
        weights: Number format of the weights.
        kv_cache: Number format of the KV cache.
    """

    decides: str
    only: str | None = None
    weights: str = "full"
    kv_cache: str = "full"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


SYSTEMS = {
    "dense": System("dense"),
    "dense_int8": System("dense", weights="int8", kv_cache="int8"),
    "dense_int4": System("dense", weights="int4", kv_cache="int8"),
    "static": System("static"),
    "weights_only": System("greedy", only=MLP),
    "kv_only": System("greedy", only=ATTENTION),
    "greedy": System("greedy"),
    "greedy_int8": System("greedy", weights="int8", kv_cache="int8"),
}


def systems_of(names: Sequence[str], policies: Mapping[str, str]) -> dict[str, System]:
    """Looks systems up by name; a policy that is given as a folder is a system of its name, with greedy behind it, and
    `NAME_int8` the same over INT8.

    Raises:
        UnknownName: There is no such system.
    """
    known = SYSTEMS | {name: System(name) for name in policies}
    known |= {f"{name}_int8": System(name, weights="int8", kv_cache="int8") for name in policies}
    return {name: known[check_known("system", name, known)] for name in names}


def deciders_of(
    system: System, shape: ModelShape, folders: Mapping[str, Path], static: Scenario, coarse_step: int
) -> dict[str, Decider]:
    """Who is asked, in which order.

    Args:
        system: The system.
        shape: Of the model in the system's number formats.
        folders: Saved policies by name, `greedy` among them.
        static: What the static mask is chosen for.
        coarse_step: See `CoarseWidths`.

    Raises:
        PolicyUnreadable: A folder holds no policy.
        InfeasibleBudget: There is no static mask.
    """
    if system.decides == "dense":
        return {"dense": DensePolicy(shape)}
    names = ["greedy"] if system.decides in ("static", "greedy") else [system.decides, "greedy"]
    policies: dict[str, Decider] = {name: _for_shape(load_policy(folders[name]), shape) for name in names}
    if system.only is not None:
        policies = {f"greedy, {system.only} only": OnlyKind(policies["greedy"], system.only)}
    policies = {name: CoarseWidths(each, shape, coarse_step) for name, each in policies.items()}
    if system.decides == "static":
        return {"static": OneMask(policies["greedy"].decide(static.workload, static.budget_bytes))}
    return policies


def _for_shape(policy: Policy, shape: ModelShape) -> Policy:
    """The policy over the same components in other number formats."""
    return type(policy).restore(shape, policy.parameters(), policy.tensors())


class OneMask:
    """Always decides on the same mask."""

    def __init__(self, mask: PruningMask) -> None:
        self._mask = mask

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        return self._mask


class OnlyKind:
    """Drops components of one kind of site only.

    Args:
        policy: Its costs say in which order.
        kind: Of the sites.
    """

    def __init__(self, policy: PricedPolicy, kind: str) -> None:
        costs = policy.parameters()["costs"]
        self._fixed = [row for row in policy.shape.components if row.site.kind != kind]
        self._policy = PricedPolicy(policy.shape, costs | {row.name: _NEVER for row in self._fixed})

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        """Chooses a mask.

        Raises:
            InfeasibleBudget: Dropping all sites of the kind is not enough.
        """
        mask = self._policy.decide(workload, budget_bytes)
        whole = mask.restore(*self._fixed)
        if whole != mask:
            raise InfeasibleBudget(budget_bytes, footprint(self._policy.shape, whole, workload).peak_bytes, workload)
        return mask
