"""The threshold follows a target precision."""

import math

import numpy as np
import pytest

from rap_env.errors import RankingFailed
from rap_env.rerank.calibration import adjusted, calibrate, precision
from rap_env.rerank.clusters import ClusterRule


def paths(n: int, seed: int = 0, n_layers: int = 12) -> list[np.ndarray]:
    """Scores that grow out of noise layer by layer, and apart: who decides early is often wrong."""
    rng = np.random.default_rng(seed)
    drift = np.linspace(0, 1, n_layers)[:, None]
    return [5 + 2 * drift * rng.normal(size=20) + 0.3 * rng.normal(size=(n_layers, 20)) * (1 - drift) for _ in range(n)]


def test_the_threshold_moves_by_the_distance_from_the_target():
    assert adjusted(0.1, 0.8, 0.99) == pytest.approx(0.1 * math.exp(2 * 0.19))
    assert adjusted(0.1, 1.0, 0.99) == pytest.approx(0.1 * math.exp(-0.02))
    assert adjusted(0.1, 0.99, 0.99) == 0.1


@pytest.mark.parametrize("arguments", [(0, 0.5, 0.9), (0.1, 1.1, 0.9), (0.1, 0.5, -1), (0.1, math.nan, 0.9)])
def test_what_is_no_threshold_or_precision_is_refused(arguments):
    with pytest.raises(RankingFailed, match="expected a threshold above 0 and precisions from 0 to 1"):
        adjusted(*arguments)


def test_precision_is_the_share_of_the_full_models_best():
    path = np.array([[9.0, 8.0, 1.0, 1.1], [1.0, 9.0, 8.0, 0.0]])
    assert precision(path, ClusterRule(threshold=0.1), 2) == 0.5  # {0, 1} after the first layer, {1, 2} in the end
    assert precision(path, ClusterRule(threshold=1e9), 2) == 1


@pytest.mark.parametrize("start", [0.001, 1.0])
def test_calibration_comes_to_the_target_from_either_side(start):
    rule = calibrate(ClusterRule(threshold=start, first_layer=1), paths(300), 5, 0.9)
    unseen = [precision(path, rule, 5) for path in paths(200, seed=1)]
    assert abs(np.mean(unseen) - 0.9) < 0.05
    assert rule.first_layer == 1
