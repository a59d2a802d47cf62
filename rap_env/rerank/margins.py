"""Margins by layer: who leaves is farther from the last open place than scores still move."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rap_env.errors import RankingFailed, RecordUnreadable
from rap_env.reading import read_json, reading
from rap_env.rerank.adapter import EMBEDDED_ADAPTER
from rap_env.rerank.cuts import Cut
from rap_env.rerank.selection import Decision

EMBEDDED_MARGINS = EMBEDDED_ADAPTER / "margins.json"  # made by experiments/selection_margins.py


def score_noise(paths: Sequence[np.ndarray]) -> np.ndarray:
    """By how much differences of scores after each layer miss what they will be after the last one [layers].

    For each layer the final differences between a request's candidates are regressed on the present ones, through 0,
    over all pairs of all requests. The noise is the standard deviation of what the regression leaves over, divided by
    its slope: so it is in units of the present scores. It is infinite where the slope is not positive, as in early
    layers that say nothing about the order, and 0 after the last layer.

    Args:
        paths: Scores of each request after every layer [layers, n].

    Raises:
        RankingFailed: No request has two candidates, or one has another number of layers than the first.
    """
    if not any(path.shape[1] > 1 for path in paths) or len({len(path) for path in paths}) > 1:
        raise RankingFailed("expected a request of two candidates or more, and as many layers of each request")
    # Sums over all pairs of a request are n times those over its centred scores.
    centred = np.concatenate([(path - path.mean(axis=1, keepdims=True)) * path.shape[1] ** 0.5 for path in paths], 1)
    n_pairs = sum(path.shape[1] * (path.shape[1] - 1) / 2 for path in paths)
    squares = (centred**2).sum(axis=1)
    slopes = np.divide((centred * centred[-1]).sum(axis=1), squares, out=np.zeros(len(centred)), where=squares > 0)
    left_over = np.sqrt(((centred[-1] - slopes[:, None] * centred) ** 2).sum(axis=1) / n_pairs)
    return np.divide(left_over, slopes, out=np.full(len(centred), np.inf), where=slopes > 0)


@dataclass(frozen=True)
class MarginRule:
    """Selects and drops who is a margin away from the other side of the border between the places and the rest.

    Attributes:
        noise: Of each layer [layers], see `score_noise`.
        margin: In units of the noise; a larger one prunes later.

    Raises:
        RankingFailed: The margin is not positive, or a noise is negative or no number.
    """

    noise: tuple[float, ...]
    margin: float

    def __post_init__(self) -> None:
        if not self.margin > 0 or not all(noise >= 0 for noise in self.noise):
            raise RankingFailed(f"expected a positive margin and no negative noise; got {self.margin} and {self.noise}")

    @classmethod
    def load(cls, path: str | Path = EMBEDDED_MARGINS) -> "MarginRule":
        """Reads a rule; by default that of the embedded reranker.

        Args:
            path: A file of `experiments.selection_margins`.

        Raises:
            RecordUnreadable: There is none.
        """
        what = "margins by layer"
        found = read_json(Path(path), what, RecordUnreadable)
        with reading(path, what, RecordUnreadable):
            noise = (np.inf if each is None else float(each) for each in found["noise"])
            return cls(tuple(noise), float(found["margin"]))

    def decide(self, layer: int, scores: np.ndarray, n_open: int) -> Decision:
        """See `Decider.decide`.

        Raises:
            RankingFailed: The model has more layers than there are noises.
        """
        if layer >= len(self.noise):
            raise RankingFailed(f"expected a model of {len(self.noise)} layers; got a decision after layer {layer}")
        return Cut(selects=True, drops=True, margin=self.margin).decision(scores, n_open, self.noise[layer])
