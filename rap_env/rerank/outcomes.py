"""What a ranking came to: how far it agrees with the full model, and what was read for it."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from rap_env.errors import RankingFailed
from rap_env.rerank.selection import Decider, Ranking, replay
from rap_env.rerank.similarity import SimilarityExit


@dataclass(frozen=True)
class Outcome:
    """Of one request.

    Attributes:
        agreement: Share of the full model's best K that were returned.
        executions: Layers times candidates that were run, over those of the full model.
        compute: The same with each candidate weighted by its tokens. What all candidates share in front is left out.
    """

    agreement: float
    executions: float
    compute: float


def agreement(ids: Collection[int], full_ids: Collection[int]) -> float:
    """Which share of the full model's best K is among those that were returned."""
    return len(set(full_ids) & set(ids)) / len(full_ids)


def outcome(ranking: Ranking, full_ids: Collection[int], tokens: np.ndarray, n_layers: int) -> Outcome:
    """What a ranking came to.

    Args:
        ranking: Of n candidates.
        full_ids: The K that the full model returns.
        tokens: Of each candidate [n].
        n_layers: Of the model.
    """
    layers = np.array(ranking.layers)
    return Outcome(
        agreement(ranking.ids, full_ids),
        float(layers.sum()) / (n_layers * len(layers)),
        float(layers @ tokens) / (n_layers * float(tokens.sum())),
    )


def replayed(
    path: np.ndarray,
    tokens: np.ndarray,
    decider: Decider | SimilarityExit | None,
    top_k: int,
    similarities: np.ndarray | None = None,
) -> Outcome:
    """The outcome of a recorded request.

    Args:
        path: Scores after every layer [layers, n].
        tokens: Of each candidate [n].
        decider: Who decides; None reads everything.
        top_k: K.
        similarities: Of each candidate to the query [n], which a `SimilarityExit` needs.

    Raises:
        RankingFailed: They are needed and not given.
    """
    full_ids = replay(path, None, top_k).ids
    if isinstance(decider, SimilarityExit):
        if similarities is None:
            raise RankingFailed("expected similarities, by which documents leave; these paths were recorded without")
        ranking = decider.replay(path, similarities, top_k)
    else:
        ranking = replay(path, decider, top_k)
    return outcome(ranking, full_ids, tokens, len(path))
