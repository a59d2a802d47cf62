"""Thresholds of the rules that prune: the lowest that still agree with the full model on training queries."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from agents.selection_rivals import MARGINS
from rap_env.rerank import ClusterRule
from rap_env.rerank.calibration import precision
from rap_env.rerank.margins import MarginRule
from rap_env.rerank.selection import Decider

_QUANTILES, _TAIL = 16, 25  # steps


def lowest_threshold(rule: ClusterRule, paths: Sequence[np.ndarray], top_k: int, target: float) -> float:
    """Walks down from a threshold that prunes nothing while the mean agreement meets the target.

    A threshold only matters where scores have spreads on either side of it, so the steps are quantiles of the spreads
    that the paths have; between the two highest of these, where a mean near 0 makes some spreads very large, they are
    powers. The online rule (`rap_env.rerank.calibrate`) ends where the last requests left it; with few
    requests this walk says what all of them say.

    Args:
        rule: The rule with any threshold.
        paths: Scores of training requests after every layer [layers, n].
        top_k: K; with as many documents, or fewer, nothing is ever pruned.
        target: Least mean share of the full model's best K.
    """
    spreads = np.concatenate([np.abs(path.std(1) / path.mean(1)) for path in paths])
    lowest = float(spreads.max()) * 2  # a subset of the scores may spread more than all of them
    highest, second, *others = np.quantile(spreads, np.linspace(1, 0, _QUANTILES))
    tail = np.geomspace(highest, second, _TAIL) if second > 0 else [highest, second]
    thresholds = map(float, [*tail, *others])
    rules = ((threshold, replace(rule, threshold=threshold)) for threshold in thresholds)
    return _last_that_agrees(rules, paths, top_k, target, lowest)


def lowest_margins(
    noise: np.ndarray, paths: Sequence[np.ndarray], sizes: Sequence[int], top_ks: Sequence[int], target: float
) -> dict[tuple[int, int], float]:
    """Walks down over `MARGINS` in the same way, from the one with which nobody leaves.

    A rule that has one margin for all takes the widest of these.

    Args:
        noise: Of each layer [layers], see `score_noise`.
        paths: As for `lowest_threshold`.
        sizes: Numbers of candidates: so many of the first ones.
        top_ks: Values of K.
        target: Least mean share of the full model's best K.

    Returns:
        The margin that each number of candidates and K need.
    """
    rules = [(margin, MarginRule(tuple(noise.tolist()), margin)) for margin in reversed(MARGINS)]
    return {
        (size, k): _last_that_agrees(rules, [path[:, :size] for path in paths], k, target, MARGINS[-1])
        for size, k in itertools.product(sizes, top_ks)
    }


def _last_that_agrees(
    rules: Iterable[tuple[float, Decider]], paths: Sequence[np.ndarray], top_k: int, target: float, lowest: float
) -> float:
    for threshold, rule in rules:
        if np.mean([precision(path, rule, top_k) for path in paths]) < target:
            break
        lowest = threshold
    return lowest
