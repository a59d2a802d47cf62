"""A policy that chooses cuts by features, as a decider of a reranker."""

from collections.abc import Callable

import numpy as np

from rap_env.errors import RankingFailed
from rap_env.rerank.budgets import UNLIMITED, Budgets
from rap_env.rerank.cuts import CUTS
from rap_env.rerank.features import Features
from rap_env.rerank.selection import Decision


class Choosing:
    """Makes any policy over the observations and actions of `rap/Selection-v0` a `Decider`.

    It remembers the request from layer to layer: one request after the other, each from its first layer on.

    Args:
        choose: From features [23], see `Features`, to a number of `CUTS`.
        spreads: The unit of each layer [layers], of the paths that the policy was learned on.
        budgets: Of each request.
    """

    def __init__(self, choose: Callable[[np.ndarray], int], spreads: np.ndarray, budgets: Budgets = UNLIMITED) -> None:
        self._choose, self._spreads, self._budgets = choose, spreads, budgets
        self._features: Features | None = None

    def decide(self, layer: int, scores: np.ndarray, n_open: int) -> Decision:
        """See `Decider.decide`.

        Raises:
            RankingFailed: The model has more layers than there are units.
        """
        if layer >= len(self._spreads) - 1:
            raise RankingFailed(f"expected a model of {len(self._spreads)} layers; got a decision after layer {layer}")
        if layer == 0:
            self._features = Features(self._spreads, len(scores), n_open, self._budgets)
        action = self._choose(self._features.observe(layer, scores, n_open))
        decision = CUTS[action].decision(scores, n_open, self._spreads[layer])
        decision = self._features.affordable(decision, scores, n_open)
        self._features.narrow(decision)
        return decision
