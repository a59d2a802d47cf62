"""Predicts scores of masks that were never evaluated, from those that were."""

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel

from rap_env.mask import PruningMask

_KERNEL = ConstantKernel(1.0, (1e-3, 1e3)) * DotProduct(1.0, (1e-2, 1e2)) + ConstantKernel(1.0, (1e-3, 1e3)) * RBF(
    2.0, (0.5, 20.0)
)
_NOISE = WhiteKernel(1e-3, (1e-6, 1.0))
_JITTER = 1e-10
_LEAST_SHARED = 3  # masks with both a score and a loss, for a line through them
_WIDTHS = (1.0, 2.0)  # of the neighbourhoods in depth, in layers


class ScorePredictor:
    """A Gaussian process over what is dropped: a linear part for what each component is worth alone, and one that falls
    with the distance of two masks for how components act together.

    Dropped components near to each other in depth harm more than apart, so a mask is described by how much of each site
    and of each kind around every layer is dropped. The process is fitted to log(1 + dense score - score), because
    scores fall ever faster while more is dropped. PPF (arXiv 2508.02381) predicts losses with a network from thousands
    of masks; a process needs tens, and knows what it does not know.

    Args:
        scores: Evaluated masks, at least two; the best of them stands for the dense one.
        settled: A predictor of the same model whose kernel is taken over instead of being fitted.
        losses: Calibration losses of further masks, of a ranking for instance. A line through the masks that have both
            turns them into scores, and what it leaves unexplained is their noise. Those below all evaluated scores are
            left out; without three masks that have both, or where scores do not fall with losses, none tells anything.
    """

    def __init__(
        self,
        scores: Mapping[PruningMask, float],
        settled: "ScorePredictor | None" = None,
        losses: Mapping[PruningMask, float] | None = None,
    ) -> None:
        if len(scores) < 2:
            raise ValueError(f"expected at least two evaluated masks; got {len(scores)}")
        hinted = _hinted_by(losses or {}, scores)
        self._best = max([*scores.values(), *hinted.values()])
        costs, hinted_costs = self._costs(scores), self._costs(hinted)
        errors = [hinted_costs.pop(mask) - cost for mask, cost in costs.items() if mask in hinted_costs]
        worst = max(costs.values())
        hinted_costs = {mask: cost for mask, cost in hinted_costs.items() if cost <= worst}
        values = np.array([*costs.values(), *hinted_costs.values()])
        noise = np.mean(np.square(errors)) / values.var() if errors else 0.0
        self._n_evaluated = len(costs)
        kernel = settled._process.kernel_ if settled else _KERNEL + _NOISE
        self._process = GaussianProcessRegressor(
            kernel,
            alpha=np.repeat([_JITTER, _JITTER + noise], [len(costs), len(hinted_costs)]),
            optimizer=None if settled else "fmin_l_bfgs_b",
            normalize_y=True,
            random_state=0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a bound of the kernel's sizes was met
            self._process.fit(_features([*costs, *hinted_costs]), values)

    def _costs(self, scores: Mapping[PruningMask, float]) -> dict[PruningMask, float]:
        return {mask: math.log1p(self._best - score) for mask, score in scores.items()}

    def predict(self, masks: Sequence[PruningMask]) -> np.ndarray:
        """Scores [N]."""
        return self._best - np.expm1(self._process.predict(_features(masks)))

    def cautious(self, masks: Sequence[PruningMask]) -> np.ndarray:
        """Scores [N] half a deviation below what is predicted: the less is known of a mask, the less it promises."""
        mean, deviation = self._process.predict(_features(masks), return_std=True)
        return self._best - np.expm1(mean + 0.5 * deviation)

    def expected_improvement(self, masks: Sequence[PruningMask], score: float) -> np.ndarray:
        """By how much each mask [N] may be expected to better a score, where a worse one costs nothing (Mockus 1978).

        Taken in the logarithm that the process is fitted to, and brought back by its slope at the score.
        """
        mean, deviation = self._process.predict(_features(masks), return_std=True)
        gap = math.log1p(self._best - score) - mean
        deviation = np.maximum(deviation, 1e-12)
        improvement = gap * norm.cdf(gap / deviation) + deviation * norm.pdf(gap / deviation)
        return (1.0 + self._best - score) * improvement

    @property
    def leave_one_out_error(self) -> float:
        """Mean absolute error of log(1 + dense score - score) for each evaluated mask, predicted from all others.

        Follows from the fitted process without fitting it again (Rasmussen and Williams 2006, equation 5.12).
        """
        process = self._process
        inverse = np.linalg.inv(process.L_ @ process.L_.T)
        errors = np.abs(process.alpha_.ravel() / np.diag(inverse))[: self._n_evaluated]
        return float(errors.mean() * process._y_train_std)


def _hinted_by(losses: Mapping[PruningMask, float], scores: Mapping[PruningMask, float]) -> dict[PruningMask, float]:
    """What a line makes of calibration losses as scores, for all masks that have one; empty if it says nothing."""
    both = [mask for mask in losses if mask in scores]
    known, evaluated = (np.array([values[mask] for mask in both]) for values in (losses, scores))
    if len(both) < _LEAST_SHARED or np.ptp(known) == 0.0:
        return {}
    slope, level = np.polyfit(known, evaluated, 1)
    return {mask: slope * loss + level for mask, loss in losses.items()} if slope < 0.0 else {}


def _features(masks: Sequence[PruningMask]) -> np.ndarray:
    """How much of each site is dropped, and around every layer for each kind and width, [N, features]."""
    sites = masks[0].components.sites
    dropped = 1.0 - np.array([mask.keep for mask in masks], dtype=float)
    dropped = np.stack([dropped[:, positions].mean(axis=1) for _site, positions in sites], axis=1)
    layers, kinds = (np.array([getattr(site, name) for site, _positions in sites]) for name in ("layer", "kind"))
    depths = np.arange(layers.max() + 1)
    columns = [dropped]
    for width in _WIDTHS:
        near = np.exp(-0.5 * ((layers[:, None] - depths) / width) ** 2)
        columns += [dropped @ (near / near.sum(0) * (kinds == kind)[:, None]) for kind in np.unique(kinds)]
    return np.concatenate(columns, axis=1)
