"""The policy that has another one for each kind of text, as EvoP has a pattern for each cluster (arXiv 2502.14910)."""

from collections.abc import Mapping
from typing import Any

import torch

from rap_env.errors import check_known
from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask
from rap_env.memory.workload import Workload
from rap_env.policies.base import Policy, policy_kind, restored


@policy_kind
class KindsPolicy(Policy):
    """Decides as the policy of the workload's kind of text does.

    Args:
        shape: The model.
        policies: A policy for each kind, and under `""` one for workloads that do not tell theirs.
    """

    kind = "by_kind"

    def __init__(self, shape: ModelShape, policies: Mapping[str, Policy]) -> None:
        self.shape, self._policies = shape, dict(policies)

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        """Chooses a mask.

        Raises:
            UnknownName: There is no policy for the workload's kind.
            InfeasibleBudget: No mask of that policy can meet the budget.
        """
        check_known("kind of text", workload.kind, self._policies)
        return self._policies[workload.kind].decide(workload, budget_bytes)

    def parameters(self) -> dict[str, Any]:
        return {
            "policies": {
                name: {"kind": each.kind, "parameters": each.parameters()} for name, each in self._policies.items()
            }
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"{name}/{key}": of for name, each in self._policies.items() for key, of in each.tensors().items()}

    @classmethod
    def restore(cls, shape: ModelShape, parameters: Mapping, tensors: Mapping[str, torch.Tensor]) -> "KindsPolicy":
        policies = {}
        for name, saved in parameters["policies"].items():
            prefix = f"{name}/"
            own = {key.removeprefix(prefix): of for key, of in tensors.items() if key.startswith(prefix)}
            policies[name] = restored(saved["kind"], shape, saved["parameters"], own)
        return cls(shape, policies)
