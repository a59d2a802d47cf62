"""Progressive cluster pruning: candidates leave when their scores fall into clusters (GRATING, arXiv 2510.15620)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from rap_env.errors import RankingFailed
from rap_env.rerank.selection import Decision


@dataclass(frozen=True)
class ClusterRule:
    """The published rule: goes on while scores are close together, then cuts them into clusters.

    Where |std / mean| of the scores is at most a threshold, all go on. Else one-dimensional k-means is run. The cluster
    that holds the last open place goes on; those above it are selected, those below dropped. If the cluster just fills
    the places that are left, it is selected too, and the request ends.

    The clusters are those of the least sum of squares, which in one dimension are found exactly, so that no start is
    drawn at random; their number is the one with the highest mean silhouette, the smaller of equal ones.

    Attributes:
        threshold: Of |std / mean|; a higher one prunes later.
        max_clusters: Largest number of clusters, at least 2.
        first_layer: The first layer after which anybody may leave, counted from 0.
        keeps_order: Whether the order inside the top K matters: then clusters are only dropped, and what is left is
            ordered by the scores of the last layer.

    Raises:
        RankingFailed: The threshold is negative or no number, or there are fewer than 2 clusters.
    """

    threshold: float
    max_clusters: int = 4
    first_layer: int = 0
    keeps_order: bool = False

    def __post_init__(self) -> None:
        if not self.threshold >= 0 or self.max_clusters < 2:
            raise RankingFailed(
                "expected a threshold of at least 0 and at least 2 clusters;"
                f" got threshold={self.threshold}, max_clusters={self.max_clusters}"
            )

    def decide(self, layer: int, scores: np.ndarray, n_open: int) -> Decision:
        """See `Decider.decide`."""
        everybody = tuple(range(len(scores)))
        if layer < self.first_layer or len(scores) <= n_open or not self._spread(scores):
            return Decision(deferred=everybody)
        clusters = best_clusters(scores, self.max_clusters)
        ends = list(accumulate(map(len, clusters)))
        number = next(number for number, end in enumerate(ends) if end >= n_open)  # of the cluster with the last place
        above = tuple(index for cluster in clusters[:number] for index in cluster)
        below = tuple(index for cluster in clusters[number + 1 :] for index in cluster)
        own = tuple(clusters[number])
        if self.keeps_order:
            return Decision(dropped=below, deferred=above + own)
        if ends[number] == n_open:
            return Decision(selected=above + own, dropped=below)
        return Decision(above, below, own)

    def _spread(self, scores: np.ndarray) -> bool:
        spread = float(scores.std())
        return spread > self.threshold * abs(float(scores.mean())) and spread > 0


def best_clusters(scores: np.ndarray, max_clusters: int) -> list[list[int]]:
    """Clusters of scores that are not all equal, the highest first, as indices.

    Args:
        scores: At least two different ones [n].
        max_clusters: Largest number of clusters, at least 2.
    """
    values, members = np.unique(scores, return_inverse=True)  # equal scores are never parted
    counts = np.bincount(members)
    found = [_cut(values, counts, k) for k in range(2, min(max_clusters, len(values)) + 1)]
    best = max(found, key=lambda bounds: round(_silhouette(values, counts, bounds), 9))  # the first of equal ones
    labels = np.searchsorted(best[1:], np.arange(len(values)), side="right")[members]
    return [np.flatnonzero(labels == label).tolist() for label in reversed(range(len(best) - 1))]


def _cut(values: np.ndarray, counts: np.ndarray, k: int) -> list[int]:
    """Bounds of the k runs of ascending values whose sum of squared distances from their means is the least."""
    centred = values - values.mean()
    sums = [np.concatenate([[0], np.cumsum(counts * centred**power)]) for power in (0, 1, 2)]

    def cost(first: int, end: int) -> float:
        n, total, squares = (float(cumulated[end] - cumulated[first]) for cumulated in sums)
        return squares - total**2 / n

    n = len(values)
    least = {(1, end): (cost(0, end), 0) for end in range(1, n + 1)}
    for runs in range(2, k + 1):
        for end in range(runs, n + 1):
            least[runs, end] = min((least[runs - 1, cut][0] + cost(cut, end), cut) for cut in range(runs - 1, end))
    bounds = [n]
    for runs in range(k, 0, -1):
        bounds.insert(0, least[runs, bounds[0]][1])
    return bounds


def _silhouette(values: np.ndarray, counts: np.ndarray, bounds: Sequence[int]) -> float:
    """Mean over all scores of (b - a) / max(a, b): mean distances to the next and to the own cluster, 0 if alone."""
    distances = np.abs(values[:, None] - values) * counts
    runs = [slice(*ends) for ends in pairwise(bounds)]
    total = 0.0
    for own in runs:
        size = counts[own].sum()
        if size == 1:
            continue
        within = distances[own, own].sum(1) / (size - 1)
        others = np.min([distances[own, run].sum(1) / counts[run].sum() for run in runs if run != own], axis=0)
        total += float((counts[own] * (others - within) / np.maximum(others, within)).sum())
    return total / float(counts.sum())
