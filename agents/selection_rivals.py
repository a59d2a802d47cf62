"""Rules that choose in `rap/Selection-v0` without learning, and the settings that each is tuned over."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rap_env.rerank.clusters import ClusterRule
from rap_env.rerank.cuts import CUTS, GO_ON, STOP, Cut
from rap_env.rerank.margins import MarginRule
from rap_env.rerank.selection import Decider, Decision
from rap_env.rerank.similarity import SimilarityExit

PUBLISHED = "published rule"
_THRESHOLDS = (*np.geomspace(0.02, 200.0, 25).round(4).tolist(), 1e9)  # of |std / mean|; the last never prunes
_SIMILARITY_MARGINS = (*np.linspace(0.0, 6.0, 25).tolist(), 1e9)  # in spreads of a request's; the last drops nobody
MARGINS = (*np.geomspace(0.05, 16.0, 60).round(4).tolist(), 1e9)  # in noises of a layer; the last drops nobody
_N_FIRST_LAYERS = 8


@dataclass(frozen=True)
class FixedCut:
    """One and the same cut after each layer from some layer on.

    Attributes:
        cut: Which.
        first_layer: The first layer after which it is made, counted from 0.
        spreads: The unit of each layer [layers].
    """

    cut: Cut
    first_layer: int
    spreads: np.ndarray

    def decide(self, layer: int, scores: np.ndarray, n_open: int) -> Decision:
        """See `Decider.decide`."""
        cut = self.cut if layer >= self.first_layer else GO_ON
        return cut.decision(scores, n_open, self.spreads[layer])


class Unchanged:
    """Ends the request when the best K have been the same candidates for some layers.

    Args:
        n_layers: How many layers in a row have to agree with the one before.
    """

    def __init__(self, n_layers: int) -> None:
        self._n_layers, self._best, self._n_equal = n_layers, frozenset(), 0

    def decide(self, layer: int, scores: np.ndarray, n_open: int) -> Decision:
        """See `Decider.decide`; layer 0 begins a new request."""
        best = frozenset(np.argsort(-scores, kind="stable")[:n_open].tolist())
        self._n_equal = self._n_equal + 1 if layer > 0 and best == self._best else 0
        self._best = best
        return (STOP if self._n_equal >= self._n_layers else GO_ON).decision(scores, n_open, 1.0)


class Setting(NamedTuple):
    """One setting of a rule.

    Attributes:
        values: What is set, by name.
        decider: The rule with it.
    """

    values: Mapping[str, float]
    decider: Decider | SimilarityExit


def rivals(spreads: np.ndarray, noise: np.ndarray, with_similarities: bool = False) -> dict[str, list[Setting]]:
    """All settings of each rule, by its name.

    Args:
        spreads: The usual spread of scores after each layer [layers].
        noise: By how much differences of scores still move after each layer [layers], see `score_noise`.
        with_similarities: Whether similarities of embeddings were recorded, by which documents can leave.
    """
    families = _by_scores(spreads)
    families["margin of each layer's own noise"] = [
        Setting({"margin": margin}, MarginRule(tuple(noise.tolist()), margin)) for margin in MARGINS
    ]
    if with_similarities:
        families["similarity before the first layer"] = [
            Setting({"margin": margin}, SimilarityExit(margin)) for margin in _SIMILARITY_MARGINS
        ]
    return families


def _by_scores(spreads: np.ndarray) -> dict[str, list[Setting]]:
    n_layers = len(spreads)
    first_layers = sorted({n_layers * part // _N_FIRST_LAYERS for part in range(_N_FIRST_LAYERS)})
    return {
        PUBLISHED: [Setting({"threshold": threshold}, ClusterRule(threshold)) for threshold in _THRESHOLDS],
        "published rule from a layer on": [
            Setting({"threshold": threshold, "first_layer": layer}, ClusterRule(threshold, first_layer=layer))
            for threshold in _THRESHOLDS[::4]
            for layer in first_layers
        ],
        "fixed cut from a layer on": [
            Setting({"cut": number, "first_layer": layer}, FixedCut(cut, layer, spreads))
            for number, cut in enumerate(CUTS)
            for layer in first_layers
            if cut != GO_ON
        ],
        "best K unchanged": [Setting({"layers": number}, Unchanged(number)) for number in range(1, n_layers - 1)],
    }
