"""The predictor of widths: better with data where curves do not add up, unsure where there are none."""

import itertools

import numpy as np
import pytest
import torch

from rap_env.evaluation import width_predictor
from rap_env.evaluation.width_predictor import ContinuousPredictor, WidthPredictor

CURVES = [np.linspace(0.2 + 0.1 * site, 0.0, 5) for site in range(6)]


def loss(widths: np.ndarray) -> np.ndarray:
    """Sites cost more together than alone: the sum of the curves, and half its square; two of them are rivals."""
    alone = sum(curve[widths[:, site]] for site, curve in enumerate(CURVES))
    return alone + 0.5 * alone**2 + 0.4 * (widths[:, 0] < 2) * (widths[:, 1] < 2)


def masks(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 5, (n, 6))


def singles() -> np.ndarray:
    return np.array([[4] * site + [width] + [4] * (5 - site) for site, width in itertools.product(range(6), (0, 2))])


@pytest.fixture(scope="module")
def fitted() -> WidthPredictor:
    widths = np.concatenate([singles(), masks(40, 0)])
    return WidthPredictor(CURVES, widths, loss(widths))


def test_evaluated_masks_teach_what_curves_of_single_sites_do_not_know(fitted):
    asked = masks(200, 1)
    errors = np.abs(fitted.excess(fitted.predict(asked)[0]) - loss(asked))
    alone = np.abs(sum(curve[asked[:, site]] for site, curve in enumerate(CURVES)) - loss(asked))
    assert errors.mean() < 0.15 * alone.mean()


def test_errors_are_about_as_large_as_the_deviations_say(fitted):
    asked = masks(200, 1)
    mean, deviation = fitted.predict(asked)
    off = (np.log(loss(asked) + fitted.offset) - mean) / deviation
    assert 0.3 < off.std() < 3.0


def test_what_was_evaluated_is_nearly_certain(fitted):
    _mean, known = fitted.predict(masks(40, 0))
    _mean, unknown = fitted.predict(masks(200, 1))
    assert known.mean() < 0.9 * unknown.mean()


def test_the_same_data_make_the_same_predictor_and_a_settled_kernel_is_taken_over(fitted):
    widths = np.concatenate([singles(), masks(40, 0)])
    again, settled = WidthPredictor(CURVES, widths, loss(widths)), WidthPredictor(CURVES, widths, loss(widths), fitted)
    for other in (again, settled):
        assert all(np.array_equal(*pair) for pair in zip(fitted.predict(widths), other.predict(widths), strict=True))


def test_kernel_sizes_are_fitted_by_the_right_slopes(monkeypatch):
    slopes = []

    def compare(cost, start, **options):
        _value, analytic = cost(start)
        steps = 1e-5 * np.eye(len(start))
        slopes.append((analytic, [(cost(start + step)[0] - cost(start - step)[0]) / 2e-5 for step in steps]))
        return minimize(cost, start, **options)

    minimize = width_predictor.minimize
    monkeypatch.setattr(width_predictor, "minimize", compare)
    widths = masks(20, 2)
    WidthPredictor(CURVES, widths, loss(widths))
    ((analytic, numeric),) = slopes
    assert analytic == pytest.approx(np.array(numeric), abs=1e-4)


def test_losses_below_the_dense_one_and_flat_curves_are_no_trouble():
    widths = masks(12, 3)
    predictor = WidthPredictor([np.zeros(5)] * 6, widths, np.full(12, -0.01))
    mean, deviation = predictor.predict(masks(5, 4))
    assert np.isfinite(mean).all() and np.isfinite(deviation).all()


def test_between_whole_widths_it_is_continuous_and_at_them_the_same(fitted):
    continuous, asked = ContinuousPredictor(fitted), masks(50, 2)
    for own, other in zip(continuous.predict(torch.from_numpy(asked).double()), fitted.predict(asked), strict=True):
        assert np.allclose(own.numpy(), other, rtol=0, atol=1e-8)
    between = torch.from_numpy(asked).double().clamp(max=3) + 0.37
    torch.autograd.gradcheck(lambda each: continuous.predict(each)[0], between[:4].requires_grad_())
