"""Rounds of greedy removal: what each rule has in common, and the exact rule."""

from collections.abc import Mapping
from typing import NamedTuple

from rap_env.importance.trials import RemovalMeter, Trial
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask


class Removal(NamedTuple):
    """A removed component, and the calibration loss without it."""

    name: str
    loss: float


def price(increase: float, freed: float) -> float:
    """Loss increase for what a removal frees; where the loss falls, freeing more is better too."""
    return increase / freed if increase > 0 else increase * freed


class Rounds:
    """The shrinking model of one greedy search; a subclass says which trials a round makes.

    Args:
        llm: The model.
        freed: What dropping each component is worth (bytes, or 1 each); the search minimises loss increase / worth.

    Attributes:
        mask: What is left.
        loss: Its calibration loss.
        increases: Loss increase without each component, when it was measured last.
        first_increases: The same when the first round was over.
        tried: The masks of all trials.
        known: Losses of the masks that were measured on all windows.
        costs: Every measurement that the trials took.
        tokens: Tokens of these measurements.
    """

    def __init__(self, llm: SwitchableLLM, freed: Mapping[str, int]) -> None:
        self.mask = PruningMask.all_kept(llm.shape)
        self.loss = 0.0
        self.increases: dict[str, float] = {}
        self.first_increases: dict[str, float] = {}
        self.tried: set[PruningMask] = set()
        self.known: dict[PruningMask, float] = {}
        self.costs: list[Trial] = []
        self.tokens = 0
        self._freed = freed

    def remove_least_important(self) -> Removal:
        """Plays one round."""
        raise NotImplementedError

    def left(self) -> list[str]:
        """Names of what was not removed, the least important first."""
        return sorted((component.name for component in self.mask.kept), key=self._price)

    def _price(self, name: str) -> float:
        return price(self.increases.get(name, 0.0), self._freed[name])

    def _cheapest(self) -> str:
        return min(self.increases, key=self._price)

    def _count(self, name: str, trial: Trial, meter: RemovalMeter) -> float:
        self.tried.add(self.mask.drop(name))
        self.costs.append(trial)
        self.tokens += meter.tokens_per_trial
        return trial.loss


class ExactRounds(Rounds):
    """Every round tries every component that is left, on all windows."""

    def __init__(self, meter: RemovalMeter, *, freed: Mapping[str, int]) -> None:
        super().__init__(meter.llm, freed)
        self._meter = meter
        self.loss = self.known[self.mask] = meter.trial(self.mask).loss

    def remove_least_important(self) -> Removal:
        losses = {name: self._count(name, trial, self._meter) for name, trial in self._meter.trials(self.mask).items()}
        self.known |= {self.mask.drop(name): loss for name, loss in losses.items()}
        self.increases = {name: loss - self.loss for name, loss in losses.items()}
        self.first_increases = self.first_increases or self.increases
        name = self._cheapest()
        self.mask, self.loss = self.mask.drop(name), losses[name]
        return Removal(name, self.loss)
