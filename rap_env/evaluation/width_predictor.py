"""Predicts what masks of nested widths lose, from those that were evaluated and from what each site costs alone."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

_MEMBERS = 8  # of the ensemble
_RIDGES = np.logspace(-3.0, 4.0, 15)  # strengths that members choose from
_JITTER = 1e-8
_SPREAD = 0.7  # standard deviation of the logarithms of length scales about their mean, before data speaks
_OF_SINGLE_SITES = 0.1  # weight of a mask of one narrow site in regressions: the prior knows it already
_STEPS = 40  # of the optimiser that fits the kernel's sizes


class WidthPredictor:
    """The logarithm of a loss over the dense model, for widths of S sites.

    The prior mean is what the curves of single sites add up to. The rest is explained twice, by a Gaussian process with
    a length scale for each site, fitted by marginal likelihood, and by an ensemble of ridge regressions that see each
    site and each pair of neighbours in depth. Predictions are the means of both; where they disagree that counts as
    uncertainty, as their own deviations do. All is fitted to log(excess + c), where c is what a typical site costs: so
    small differences of good masks weigh as much as large ones of bad masks.

    Shapes: N masks, S sites, F features.

    Args:
        curves: For each site the excess at a width of 0, 1 ... all parts, with all others whole.
        widths: Evaluated masks [N, S].
        excess: What they lose over the dense model [N].
        settled: A predictor of the same model whose kernel is taken over instead of being fitted.

    Attributes:
        offset: c.
    """

    def __init__(
        self,
        curves: Sequence[Sequence[float]],
        widths: np.ndarray,
        excess: np.ndarray,
        settled: "WidthPredictor | None" = None,
    ) -> None:
        self._n_parts = np.array([len(curve) - 1 for curve in curves])
        self._curves = [np.asarray(curve, dtype=float) for curve in curves]
        self._warped = [_rising(curve) for curve in self._curves]
        self.offset = max(1e-3, float(np.median([curve[0] for curve in self._curves])))
        self._inputs = self._input(widths)
        rest = self._log(excess) - self._prior(widths)
        weights = np.where((widths < self._n_parts).sum(axis=1) > 1, 1.0, _OF_SINGLE_SITES)
        self._ensemble = _Ensemble(self._features(widths), rest, weights)
        self.sizes = settled.sizes if settled else _fitted_sizes(self._inputs, rest, self._basis(widths))
        self._basis_inputs = self._basis(widths)
        covariance = _covariance(self._inputs, self._inputs, self.sizes) + self._basis_inputs @ self._basis_inputs.T
        covariance[np.diag_indices_from(covariance)] += math.exp(self.sizes[1]) + _JITTER
        root = cholesky(covariance, lower=True)
        self._weights = cho_solve((root, True), rest)
        self._unmixing = solve_triangular(
            root, np.eye(len(rest)), lower=True
        ).T  # times what is shared: what it explains

    def predict(self, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [N] of log(excess + c)."""
        basis = self._basis(widths)
        shared = _covariance(self._input(widths), self._inputs, self.sizes) + basis @ self._basis_inputs.T
        mean = shared @ self._weights
        own = math.exp(self.sizes[0]) + np.square(basis).sum(axis=1)
        variance = np.maximum(own - np.square(shared @ self._unmixing).sum(axis=1), 0.0)
        other, spread = self._ensemble.predict(self._features(widths))
        deviation = np.sqrt((variance + spread**2) / 2.0 + ((mean - other) / 2.0) ** 2)
        return self._prior(widths) + (mean + other) / 2.0, deviation

    def excess(self, logarithms: np.ndarray) -> np.ndarray:
        """Losses over the dense model, from predicted logarithms."""
        return np.exp(logarithms) - self.offset

    def _log(self, excess: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(excess, -self.offset / 2.0) + self.offset)

    def _prior(self, widths: np.ndarray) -> np.ndarray:
        return self._log(sum(curve[widths[:, site]] for site, curve in enumerate(self._curves)))

    def _basis(self, widths: np.ndarray) -> np.ndarray:
        """What the prior may be wrong by as a whole [N, 5]: sites cost more together than alone."""
        prior, gone = self._prior(widths) - math.log(self.offset), 4.0 * self._input(widths).mean(axis=1)
        return np.stack([np.ones_like(prior), prior, gone, gone * prior, gone**2], axis=1)

    def _input(self, widths: np.ndarray) -> np.ndarray:
        """Where each site stands between whole (0) and gone (1): the mean of its dropped part and its curve [N, S]."""
        warped = np.stack([curve[widths[:, site]] for site, curve in enumerate(self._warped)], axis=1)
        return (1.0 - widths / self._n_parts + warped) / 2.0

    def _features(self, widths: np.ndarray) -> np.ndarray:
        """What the ensemble sees [N, F]."""
        inputs = self._input(widths)
        return np.concatenate([self._basis(widths), inputs, inputs**2], axis=1)


class _Ensemble:
    """Ridge regressions on randomly weighted masks (Bayesian bootstrap, Rubin 1981), strengths by leave-one-out.

    Args:
        features: What is seen [N, F].
        values: What is predicted [N].
        importance: Mean weight of each [N].
    """

    def __init__(self, features: np.ndarray, values: np.ndarray, importance: np.ndarray) -> None:
        generator = np.random.default_rng(0)
        self._mean = np.average(features, axis=0, weights=importance)
        self._scale = np.sqrt(np.average(np.square(features - self._mean), axis=0, weights=importance)) + 1e-6
        seen, members = (features - self._mean) / self._scale, []
        for _ in range(_MEMBERS):
            weights = importance * generator.exponential(size=len(values))
            level, roots = np.average(values, weights=weights), np.sqrt(weights)
            left, singular, right = np.linalg.svd(seen * roots[:, None], full_matrices=False)
            wanted = (values - level) * roots
            kept = singular**2 / (singular**2 + _RIDGES[:, None])  # [strengths, F]
            missed = wanted - (kept * (left.T @ wanted)) @ left.T
            of_others = missed / np.maximum(1.0 - kept @ np.square(left).T, 1e-3)
            best = np.square(of_others).sum(axis=1).argmin()
            slopes = right.T @ (singular / (singular**2 + _RIDGES[best]) * (left.T @ wanted))
            members.append(np.append(slopes, level))
        self._members = np.stack(members)

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [N] over the members."""
        of_members = ((features - self._mean) / self._scale) @ self._members[:, :-1].T + self._members[:, -1]
        return of_members.mean(axis=1), of_members.std(axis=1)


def _rising(curve: np.ndarray) -> np.ndarray:
    """A curve from 1 at a width of 0 down to 0, never falling towards narrow widths."""
    rising = np.maximum.accumulate(curve[::-1])[::-1]
    return rising / rising[0] if rising[0] > 0.0 else np.linspace(1.0, 0.0, len(curve))


def _covariance(one: np.ndarray, other: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """A squared-exponential kernel [N, M]; sizes are logarithms of variance, noise and each site's length scale."""
    one, other = one / np.exp(sizes[2:]), other / np.exp(sizes[2:])
    squares = np.square(one).sum(axis=1)[:, None] + np.square(other).sum(axis=1) - 2.0 * one @ other.T
    return np.exp(sizes[0] - np.maximum(squares, 0.0) / 2.0)


def _fitted_sizes(inputs: np.ndarray, values: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """The kernel's sizes [2 + S] of the highest marginal likelihood (Rasmussen and Williams 2006, equation 5.9).

    Length scales have a normal prior around one that starts at the square root of the number of sites.
    """
    start = np.full(2 + inputs.shape[1], math.log(math.sqrt(inputs.shape[1])))
    start[:2] = math.log(max(values.var(), 1e-4)), math.log(1e-3)
    centre, fixed = start[2:].copy(), basis @ basis.T

    def cost(sizes: np.ndarray) -> tuple[float, np.ndarray]:
        kernel, noise = _covariance(inputs, inputs, sizes), math.exp(sizes[1])
        covariance = kernel + fixed
        covariance[np.diag_indices_from(covariance)] += noise + _JITTER
        root = cholesky(covariance, lower=True)
        weights = cho_solve((root, True), values)
        inverse = cho_solve((root, True), np.eye(len(values)))
        pull = (inverse - np.outer(weights, weights)) * kernel  # [N, N]
        scaled = inputs / np.exp(sizes[2:])
        by_site = pull.sum(axis=1) @ np.square(scaled) - (scaled * (pull @ scaled)).sum(axis=0)
        likelihood = 0.5 * values @ weights + np.log(np.diag(root)).sum()
        away = (sizes[2:] - centre) / _SPREAD
        slopes = [pull.sum() / 2.0, noise * (np.trace(inverse) - weights @ weights) / 2.0, *(by_site + away / _SPREAD)]
        return likelihood + 0.5 * away @ away, np.array(slopes)

    bounds = [(-10.0, 5.0), (math.log(1e-4), 0.0), *[(math.log(0.05), math.log(100.0))] * inputs.shape[1]]
    return minimize(cost, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": _STEPS}).x


class ContinuousPredictor:
    """A `WidthPredictor` between whole widths, to be differentiated: curves are linear between their points.

    Args:
        predictor: What it equals at whole widths.
    """

    def __init__(self, predictor: WidthPredictor) -> None:
        self._offset = predictor.offset
        self.n_parts = torch.from_numpy(predictor._n_parts)
        most = int(self.n_parts.max()) + 1
        curves = [np.pad(curve, (0, most - len(curve)), "edge") for curve in predictor._curves]
        warped = [np.pad(curve, (0, most - len(curve)), "edge") for curve in predictor._warped]
        self._curves, self._warped = torch.from_numpy(np.stack(curves)), torch.from_numpy(np.stack(warped))
        sizes, ensemble = predictor.sizes, predictor._ensemble
        self._scales, self._variance = torch.from_numpy(np.exp(sizes[2:])), math.exp(sizes[0])
        self._known = torch.from_numpy(predictor._inputs) / self._scales
        self._basis_known, self._weights, self._unmixing = map(
            torch.from_numpy, (predictor._basis_inputs, predictor._weights, np.ascontiguousarray(predictor._unmixing))
        )
        self._mean, self._scale, self._members = map(
            torch.from_numpy, (ensemble._mean, ensemble._scale, ensemble._members)
        )

    def predict(self, widths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation [N] of log(excess + c) at widths [N, S], in float64."""
        below = widths.detach().floor().clamp(max=self.n_parts - 1).long()
        part, rows = widths - below, torch.arange(widths.shape[1])
        added, warped = (
            table[rows, below] + part * (table[rows, below + 1] - table[rows, below])
            for table in (self._curves, self._warped)
        )
        prior = torch.log(added.sum(1).clamp(min=-self._offset / 2.0) + self._offset)
        inputs = (1.0 - widths / self.n_parts + warped) / 2.0
        level, gone = prior - math.log(self._offset), 4.0 * inputs.mean(1)
        basis = torch.stack([torch.ones_like(level), level, gone, gone * level, gone**2], 1)
        squares = torch.cdist(inputs / self._scales, self._known, compute_mode="use_mm_for_euclid_dist").square()
        shared = self._variance * torch.exp(-squares / 2.0) + basis @ self._basis_known.T
        mean = shared @ self._weights
        variance = (self._variance + basis.square().sum(1) - (shared @ self._unmixing).square().sum(1)).clamp(min=0.0)
        features = torch.cat([basis, inputs, inputs**2], 1)
        of_members = ((features - self._mean) / self._scale) @ self._members[:, :-1].T + self._members[:, -1]
        other, spread = of_members.mean(1), of_members.std(1, correction=0)
        deviation = torch.sqrt((variance + spread**2) / 2.0 + ((mean - other) / 2.0) ** 2)
        return prior + (mean + other) / 2.0, deviation
