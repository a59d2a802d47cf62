"""Predicts scores of masks that were never judged, from those that were."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel

from rap_env.mask import PruningMask

_KERNEL = ConstantKernel(1.0, (1e-3, 1e3)) * DotProduct(1.0, (1e-2, 1e2)) + ConstantKernel(1.0, (1e-3, 1e3)) * RBF(
    2.0, (0.5, 20.0)
)
_NOISE = WhiteKernel(1e-3, (1e-6, 1.0))


class ScorePredictor:
    """A Gaussian process over keep-bits: a linear part for what each component is worth alone, and one that falls with
    the number of differing bits for how they act together.

    It is fitted to log(1 + dense score - score), because scores fall ever faster while more is dropped. PPF (arXiv
    2508.02381) predicts losses with a network from thousands of masks; a process needs tens, and knows what it does not
    know.

    Args:
        scores: Judged masks, at least two; the best of them stands for the dense one.
        settled: A predictor of the same model whose kernel is taken over instead of being fitted.
    """

    def __init__(self, scores: Mapping[PruningMask, float], settled: "ScorePredictor | None" = None) -> None:
        if len(scores) < 2:
            raise ValueError(f"expected at least two judged masks; got {len(scores)}")
        self._best = max(scores.values())
        kernel = settled._process.kernel_ if settled else _KERNEL + _NOISE
        self._process = GaussianProcessRegressor(
            kernel, optimizer=None if settled else "fmin_l_bfgs_b", normalize_y=True, random_state=0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a bound of the kernel's sizes was met
            self._process.fit(_bits(list(scores)), np.log1p(self._best - np.fromiter(scores.values(), float)))

    def predict(self, masks: Sequence[PruningMask], optimism: float = 0.0) -> np.ndarray:
        """Scores [N], raised by so many standard deviations of what is not known."""
        if optimism == 0.0:
            costs = self._process.predict(_bits(masks))
        else:
            mean, deviation = self._process.predict(_bits(masks), return_std=True)
            costs = mean - optimism * deviation
        return self._best - np.expm1(costs)

    @property
    def leave_one_out_error(self) -> float:
        """Mean absolute error of log(1 + dense score - score) for each judged mask, predicted from all others.

        Follows from the fitted process without fitting it again (Rasmussen and Williams 2006, equation 5.12).
        """
        process = self._process
        inverse = np.linalg.inv(process.L_ @ process.L_.T)
        return float(np.abs(process.alpha_.ravel() / np.diag(inverse)).mean() * process._y_train_std)


def _bits(masks: Sequence[PruningMask]) -> np.ndarray:
    """What is dropped, [N, n]."""
    return 1.0 - np.array([mask.keep for mask in masks], dtype=float)
