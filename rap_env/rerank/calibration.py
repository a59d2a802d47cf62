"""Online calibration: the threshold of the cluster rule follows a target precision (GRATING, arXiv 2510.15620)."""

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from rap_env.errors import RankingFailed
from rap_env.rerank.clusters import ClusterRule
from rap_env.rerank.outcomes import agreement
from rap_env.rerank.selection import Decider, replay

_GAIN = 2.0


def precision(path: np.ndarray, rule: Decider, top_k: int) -> float:
    """Which share of the full model's best K a rule returns.

    Args:
        path: Scores of a request after every layer [layers, n].
        rule: That decides.
        top_k: K.
    """
    return agreement(replay(path, rule, top_k).ids, replay(path, None, top_k).ids)


def adjusted(threshold: float, precision_observed: float, target: float) -> float:
    """The next threshold: times exp(2 (target - observed)), so that it rests where the mean precision is the target.

    One miss of one request in ten places raises a threshold as much as nine full hits lower it, for a target of 0.99.

    Args:
        threshold: The present one, above 0.
        precision_observed: Of one request, or the mean of several.
        target: Of the mean precision.

    Raises:
        RankingFailed: The threshold is not positive, or a precision is not between 0 and 1.
    """
    if not (threshold > 0 and 0 <= precision_observed <= 1 and 0 <= target <= 1):
        raise RankingFailed(
            "expected a threshold above 0 and precisions from 0 to 1;"
            f" got threshold={threshold}, precision_observed={precision_observed}, target={target}"
        )
    return threshold * math.exp(_GAIN * (target - precision_observed))


def calibrate(rule: ClusterRule, paths: Iterable[np.ndarray], top_k: int, target: float) -> ClusterRule:
    """The rule with a threshold that was adjusted after each of some requests.

    Args:
        rule: With the threshold to begin with.
        paths: Scores of each request after every layer [layers, n]: requests that were read again in full when there
            was time (`Reranker.score_path`).
        top_k: K.
        target: Of the mean precision.

    Raises what `adjusted` raises.
    """
    for path in paths:
        rule = replace(rule, threshold=adjusted(rule.threshold, precision(path, rule, top_k), target))
    return rule
