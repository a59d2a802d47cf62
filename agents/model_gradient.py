"""A width policy that learns from the model itself: its loss is differentiated through soft gates on all parts."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import qmc
from torch import nn

from agents.base import Learner
from agents.transfer import transferred_fractions
from agents.width_scaling import SCALED, family_inputs, scaled_fractions
from agents.window_batches import WindowBatches
from rap_env.errors import InvalidConfig
from rap_env.evaluation.width_gradients import WidthGradients
from rap_env.memory.scenario import Scenario
from rap_env.policies import WidthPolicy, load_policy
from rap_env.policies.width import WidthNetwork, width_features

_CONTEXTS = 1024  # that observations are whitened on
_LEAST_DEVIATION = 1e-2  # of a direction of the observations, relative to the largest
_LARGEST_ACTION = 0.98  # that a policy begins with: beyond it a tanh hardly has a slope
_SLOWER = 20  # steps after which the rate has fallen to 0.7


class ModelGradientAgent(Learner):
    """Learns by the gradient of the loss itself, as a deterministic policy gradient does by that of a critic.

    In a step several contexts of the family are drawn, and the policy's widths for each are read on a window of text of
    its own, at soft gates (`rap_env/evaluation/width_gradients.py`). One backward pass tells how the loss changes with
    all widths of all these contexts, and through the scaling that meets their budgets with the policy's weights
    (Silver et al. 2014, equation 9, for episodes of one step; the reward is differentiated in place of a critic).
    A pass costs what three evaluations of as many tokens do.

    The policy is a linear function of the observation, squashed by a tanh. It is trained in coordinates in which the
    family's observations have unit variance and do not correlate: they are few, four for widths of attentions and MLPs,
    and kinds of text beside them.
    It begins with equal widths, or as another model's policy. Windows are the calibration text's, each read once before
    any is read again. Some may end with an item of the tasks that masks are searched on, whose right answer alone is
    scored. No step depends on the token budget: a larger one repeats the passes of a smaller one.

    Args:
        batch: Contexts in a step, and windows; a power of two, for they lie on a Sobol sequence.
        learning_rate: Of the first step of Adam; it falls with the square root of their number.
        answers: How many windows of a step end with an item.
        start: Folder of a policy of widths, of another model as a rule, that it begins as (`agents/transfer.py`);
            None for equal widths.
        blind_to: Entries of the observation that the policy does not see, as those of `WidthNetwork`.

    Raises:
        InvalidConfig: There are to be more answers than windows, or fewer than none.
        InvalidReward: There are to be answers, and masks are searched on nothing that has any.
        CorpusUnavailable: Workloads are of a kind of text that the calibration windows are not of.
        PolicyUnreadable, UnknownName: The folder holds no policy of widths.
    """

    def __init__(
        self,
        batch: int = 8,
        learning_rate: float = 0.05,
        answers: int = 0,
        start: str | None = None,
        blind_to: Sequence[str] = (),
    ) -> None:
        if not 0 <= answers <= batch:
            raise InvalidConfig(f"answers: expected 0 to {batch}, the windows of a step; got {answers}")
        self._batch, self._learning_rate, self._answers = batch, learning_rate, answers
        self._blind_to = tuple(blind_to)
        self._start = None if start is None else load_policy(os.path.expanduser(start))

    def learn(self) -> None:
        task, problem = self.task, self.task.problem
        shape, budget = problem.shape, problem.budget
        gradients = WidthGradients(problem.llm, problem.store, budget)
        points = qmc.Sobol(task.sampler.n_dimensions, rng=task.seed)
        known = points.random(_CONTEXTS)
        features = self._seen([task.sampler.at(shape, point) for point in known])[0]
        self._whitening = _Whitening(features, len(task.sampler.kinds))
        self._linear = nn.Linear(self._whitening.rank, len(shape.components.sites), dtype=torch.float64)
        nn.init.zeros_(self._linear.weight)  # equal widths at first
        nn.init.zeros_(self._linear.bias)
        if self._start is not None:
            fractions = transferred_fractions(self._start, shape, task.sampler, known)
            _fit(self._linear, self._whitening(features), fractions)
        optimizer = torch.optim.Adam(self._linear.parameters(), lr=self._learning_rate, betas=(0.8, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1.0 + step / _SLOWER) ** -0.5)
        losses = self.details["losses"] = []
        batches = WindowBatches(task, self.generator, self._answers)
        while True:
            contexts = [task.sampler.at(shape, point) for point in points.random(self._batch)]
            windows, n_scored = batches.draw([context.workload.kind for context in contexts])
            if gradients.tokens(windows) > budget.left:
                break
            seen, room, sizes = self._seen(contexts)
            actions = self._linear(self._whitening(seen)).tanh()
            widths = scaled_fractions(actions, sizes, room) * gradients.n_parts
            of_windows, slopes = gradients.measure(windows, widths, n_scored)
            optimizer.zero_grad()
            widths.backward(slopes / len(windows))
            optimizer.step()
            schedule.step()
            losses.append(of_windows.mean().item())
            task.progress(budget.spent, budget.limit or budget.spent)
            task.log(budget.spent, {"loss": losses[-1]})

    def policy(self) -> WidthPolicy:
        seen = {"blind_to": self._blind_to, "kinds": self.task.sampler.kinds}
        network = WidthNetwork(self._linear.out_features, layers=(), squashed=True, **seen)
        weight, bias = self._whitening.undone(self._linear)
        network.linears[0].load_state_dict({"weight": weight.float(), "bias": bias.float()})
        return WidthPolicy(self.task.problem.shape, network, SCALED)

    def _seen(self, contexts: Sequence[Scenario]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features of contexts [B, F], bytes that sites may take [B] and those of whole sites [B, S]."""
        entries, room, sizes = family_inputs(self.task.problem.shape, contexts, self.task.sampler.kinds)
        return width_features(entries, self._blind_to).double(), room, sizes


def _fit(linear: nn.Linear, seen: torch.Tensor, fractions: np.ndarray) -> None:
    """Makes a layer one whose squashed outputs for inputs [N, R] are about those that ask for fractions [N, S]."""
    wanted = torch.from_numpy(2.0 * fractions - 1.0).clamp(-_LARGEST_ACTION, _LARGEST_ACTION).atanh()
    weights = torch.linalg.lstsq(torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1), wanted).solution
    with torch.no_grad():
        linear.weight.copy_(weights[:-1].T)
        linear.bias.copy_(weights[-1])


class _Whitening:
    """Takes features of observations to coordinates of unit variance that do not correlate, over a family's contexts.

    Kinds of text stay as they are, 0 or 1: each moves its own weights by its own windows.

    Shapes: N contexts, F features, R directions in which they differ, kinds among them.

    Args:
        features: Of the contexts' observations [N, F], in float64.
        n_kinds: How many of the last features are kinds of text.
    """

    def __init__(self, features: torch.Tensor, n_kinds: int = 0) -> None:
        n_others = features.shape[1] - n_kinds
        others = features[:, :n_others]
        self._mean = torch.cat([others.mean(0), features.new_zeros(n_kinds)])
        _left, singular, right = torch.linalg.svd(others - others.mean(0), full_matrices=False)
        differ = singular > _LEAST_DEVIATION * singular[0]
        directions = right[differ] / singular[differ, None] * np.sqrt(len(features))
        self._directions = torch.block_diag(directions, torch.eye(n_kinds, dtype=features.dtype))  # [R, F]

    @property
    def rank(self) -> int:
        """R."""
        return len(self._directions)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Features [N, F] -> coordinates [N, R], in float64."""
        return (features.double() - self._mean) @ self._directions.T

    def undone(self, linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the linear function of features that one of coordinates is."""
        weight = linear.weight.detach() @ self._directions
        return weight, linear.bias.detach() - weight @ self._mean
