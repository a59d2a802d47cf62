"""What greedy importance is compared with: whole forwards of switched models, and meters that follow a rule."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from rap_env.evaluation.evaluator import Evaluation
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.importance import lazy
from rap_env.importance.lazy import split_windows
from rap_env.mask import PruningMask

# Five windows: the lazy rule's two parts can't be equally long, and the mean over both has to be a weighted one.
WINDOWS = torch.randint(0, 256, (5, 16), generator=torch.Generator().manual_seed(0))
SKETCH, REST = split_windows(WINDOWS)


class Killed(Exception):
    """Cuts a ranking off where a kill would."""


class Measurement(NamedTuple):
    """A loss that was really measured.

    Attributes:
        tokens: Tokens of the windows that it was measured on.
        dropped: Names of what the measured mask drops.
    """

    tokens: int
    dropped: tuple[str, ...]


@torch.inference_mode()
def loss_of(llm, names, windows: torch.Tensor = WINDOWS) -> float:
    """Calibration loss without the named components, by one whole forward of the switched model."""
    with llm.pruned(PruningMask.all_kept(llm.shape).drop(*names)):
        logprobs = llm.model(windows, use_cache=False).logits.double().log_softmax(-1)
    return -logprobs[:, :-1].gather(-1, windows[:, 1:, None]).mean().item()


def per_freed(increase: float, freed: float) -> float:
    """Increase for what is freed; a gain (a negative increase) is worth the more, the more is freed with it."""
    return increase / freed if increase > 0 else increase * freed


def brute_force(
    llm, removals: int, freed: Mapping[str, int] | None = None
) -> tuple[list[str], list[float], list[dict[str, float]]]:
    """The rule as the paper states it: try all that are left, each by whole forwards; remove the least harmful.

    Returns:
        The removed names, the loss after each removal, and every round's losses by name.
    """
    removed, losses, rounds = [], [loss_of(llm, [])], []
    for _ in range(removals):
        left = [c.name for c in llm.shape.components if c.name not in removed]
        trials = {name: loss_of(llm, [*removed, name]) for name in left}
        prices = {name: per_freed(loss - losses[-1], freed[name] if freed else 1) for name, loss in trials.items()}
        removed.append(min(prices, key=prices.get))
        losses.append(trials[removed[-1]])
        rounds.append(trials)
    return removed, losses[1:], rounds


def edges(masks) -> set[tuple[bool, ...]]:
    """Distinct beginnings of the keep-bits that end with a kept component: each has to be run once, and no more."""
    return {mask.keep[: end + 1] for mask in masks for end in range(len(mask.keep)) if mask.keep[end]}


def measure_by_rule(monkeypatch, loss_by_rule: Callable[[int, tuple[str, ...]], float]) -> None:
    """Makes all evaluators answer with a rule on (tokens of their windows, names of what is dropped)."""

    def evaluate_many(self, llm, masks, near=None):
        for mask in masks:
            loss = loss_by_rule(self.windows.numel(), tuple(component.name for component in mask.dropped))
            yield mask, Evaluation(-loss, {}, self.windows.numel(), 0.0)

    def influence(meter, parts):
        return [loss_by_rule(WINDOWS.numel(), (site.name,)) for (site,) in parts]

    monkeypatch.setattr(PerplexityEvaluator, "evaluate_many", evaluate_many)
    monkeypatch.setattr(lazy, "block_influence", influence)
