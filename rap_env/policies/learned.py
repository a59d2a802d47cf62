"""Policies with weights: a network that scores all components at once, or the next one to drop."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask, full_order
from rap_env.memory.footprint import check_feasible, footprint
from rap_env.memory.scenario import Scenario
from rap_env.memory.workload import Workload
from rap_env.observation import observe, valid_actions
from rap_env.policies.base import Policy, policy_kind
from rap_env.policies.network import ComponentNetwork, with_weights
from rap_env.policies.walk import fit_to_budget


class _NetworkPolicy(Policy):
    """A `ComponentNetwork`, and the static importance order that its observations carry.

    Raises:
        InvalidMask: The order does not name each component of the model once.
    """

    sequential: bool

    def __init__(self, shape: ModelShape, network: ComponentNetwork, order: Sequence[str]) -> None:
        self.shape = shape
        self._network = network.eval()
        self._order = full_order(shape.components, order)

    def parameters(self) -> dict[str, Any]:
        network = self._network
        return {"width": network.width, "blind_to": list(network.blind_to), "order": list(self._order)}

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._network.state_dict()

    @classmethod
    def restore(cls, shape: ModelShape, parameters: Mapping, tensors: Mapping[str, torch.Tensor]):
        width, blind_to = parameters["width"], parameters["blind_to"]
        network = with_weights(lambda: ComponentNetwork(shape, cls.sequential, width, blind_to), tensors)
        return cls(shape, network, parameters["order"])

    @torch.inference_mode()
    def _scores(self, scenario: Scenario, mask: PruningMask) -> np.ndarray:
        """Action scores [n_actions] of one state."""
        entries = observe(self.shape, scenario, mask, self._order)
        outputs = self._network({name: torch.from_numpy(np.array(entry))[None] for name, entry in entries.items()})
        return outputs[0, : self._network.n_actions].numpy()


@policy_kind
class OneStepPolicy(_NetworkPolicy):
    """Chooses every keep-bit at once; the importance order then drops or restores what the budget asks for.

    Serving must not overshoot, so the network's bits are projected onto the masks that fit, as in its training.
    """

    kind = "one_step_network"
    sequential = False

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        scores = self._scores(Scenario(workload, budget_bytes), PruningMask.all_kept(self.shape))
        wish = PruningMask.from_bits(self.shape, scores > 0)
        return fit_to_budget(wish, self.shape, self._order, workload, budget_bytes)


@policy_kind
class SequentialPolicy(_NetworkPolicy):
    """Drops the component with the highest score, looks at what is left, and repeats until the mask fits."""

    kind = "sequential_network"
    sequential = True

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        check_feasible(self.shape, workload, budget_bytes)
        scenario, mask = Scenario(workload, budget_bytes), PruningMask.all_kept(self.shape)
        while True:
            fits = footprint(self.shape, mask, workload).peak_bytes <= budget_bytes
            valid = valid_actions(np.array(mask.keep), fits)
            action = int(np.where(valid, self._scores(scenario, mask), -np.inf).argmax())
            if action == len(self.shape.components):
                return mask
            mask = mask.drop(self.shape.components[action])
