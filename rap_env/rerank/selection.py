"""Who of the candidates of a request is in, who is out, and who is read on: decisions after each layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rap_env.errors import RankingFailed


@dataclass(frozen=True)
class Decision:
    """What becomes of n candidates, as indices into their scores; each is in one of the three.

    Attributes:
        selected: They are in, whatever follows; at most as many as there are open places.
        dropped: They are out.
        deferred: They are read on. Without any, the request ends; with them, every open place has a candidate.
    """

    selected: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    deferred: tuple[int, ...] = ()


class Decider(Protocol):
    """Decides after each layer but the last, where the remaining places go to the best."""

    def decide(self, layer: int, scores: np.ndarray, n_open: int) -> Decision:
        """Decides over the candidates that are still read.

        Args:
            layer: The layer that was run, counted from 0.
            scores: Their scores, by the model's own head on what that layer returned [n].
            n_open: Places that are open; fewer than n, unless an earlier decision made them as many.
        """


@dataclass(frozen=True)
class Ranking:
    """The outcome of a request for the best K of n documents.

    Attributes:
        ids: Numbers of the K documents, the best first. Those that were selected earlier stand in front: scores of
            different layers can't be compared.
        scores: Of all n documents, each by the last layer that scored it [n].
        layers: How many layers read each document [n].
    """

    ids: tuple[int, ...]
    scores: tuple[float, ...]
    layers: tuple[int, ...]


class Selection:
    """The state of one request: who is read on, and who has a place.

    Args:
        n_candidates: Number n of documents, at least one.
        top_k: Places; None, or n and more, rank all of them with all layers, for their order is asked for.
        n_layers: Of the model.
        decider: None reads everything with all layers.

    Attributes:
        active: Numbers of the candidates that are read on, ascending.
    """

    def __init__(self, n_candidates: int, top_k: int | None, n_layers: int, decider: Decider | None) -> None:
        self.active: tuple[int, ...] = tuple(range(n_candidates))
        self._k = n_candidates if top_k is None else min(top_k, n_candidates)
        self._decider = decider if self._k < n_candidates else None
        self._n_layers, self._chosen = n_layers, []
        self._scores, self._layers = np.zeros(n_candidates), np.zeros(n_candidates, int)

    @property
    def n_open(self) -> int:
        """Places that are open."""
        return self._k - len(self._chosen)

    def needs_scores(self, layer: int) -> bool:
        """Whether `after` wants scores for a layer, or None."""
        return self._decider is not None or layer == self._n_layers - 1

    def after(self, layer: int, scores: np.ndarray | None) -> None:
        """Goes on to who is read by the next layer.

        Args:
            layer: The layer that was run, counted from 0.
            scores: Of the active candidates [n]; None where they are not needed.

        Raises:
            RankingFailed: A score is not a finite number, or the decision is none.
        """
        active = np.array(self.active)
        self._layers[active] = layer + 1
        if scores is None:
            return
        if not np.isfinite(scores).all():
            wrong = active[~np.isfinite(scores)].tolist()
            raise RankingFailed(f"after layer {layer} the scores of the documents {wrong} are not finite numbers")
        self._scores[active] = scores
        n_open = self.n_open
        if layer == self._n_layers - 1:
            decision = Decision(selected=tuple(_by_score(scores)[:n_open]))
        else:
            decision = self._decider.decide(layer, scores, n_open)
            check_decision(decision, len(active), n_open)
        order = [index for index in _by_score(scores) if index in set(decision.selected)]
        self._chosen += active[order].tolist()
        self.active = tuple(sorted(active[list(decision.deferred)].tolist()))

    @property
    def ranking(self) -> Ranking:
        """The outcome, once nobody is active."""
        return Ranking(tuple(self._chosen), tuple(self._scores.tolist()), tuple(self._layers.tolist()))


def replay(path: np.ndarray, decider: Decider | None, top_k: int | None) -> Ranking:
    """The outcome of a request whose scores after every layer are known, without a model.

    Args:
        path: Scores [layers, n] of all candidates, as `Reranker.score_path` returns them.
        decider: As in `Selection`.
        top_k: As in `Selection`.

    Raises:
        RankingFailed: As `Selection.after`.
    """
    n_layers, n_candidates = path.shape
    selection = Selection(n_candidates, top_k, n_layers, decider)
    for layer in range(n_layers):
        selection.after(layer, path[layer, list(selection.active)] if selection.needs_scores(layer) else None)
        if not selection.active:
            break
    return selection.ranking


def _by_score(scores: np.ndarray) -> list[int]:
    """Indices from the highest score to the lowest; equal ones stay in their order."""
    return np.argsort(-scores, kind="stable").tolist()


def check_decision(decision: Decision, n: int, n_open: int) -> None:
    """Refuses what is no decision on n candidates for so many open places; raises `RankingFailed`."""
    parts: Sequence[int] = [*decision.selected, *decision.dropped, *decision.deferred]
    if sorted(parts) != list(range(n)):
        raise RankingFailed(f"expected a decision that names each of {n} candidates once; got {decision}")
    left = n_open - len(decision.selected)
    if left < 0 or len(decision.deferred) < left or (left == 0 and decision.deferred):
        raise RankingFailed(f"expected a decision that can fill {n_open} open places, no more; got {decision}")
