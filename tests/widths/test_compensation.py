"""Refits in closed form: what the formulas say, computed another way, and what they are for."""

import pytest
import torch

from rap_env.errors import CompensationFailed
from rap_env.widths.compensation import RIDGES, best_ridge, bias_refits, procrustes_refits, ridge_refits
from rap_env.widths.statistics import InputStatistics, merged

WIDTHS = [3, 5, 8]


def drawn(n_tokens: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs [n, 12] with a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 12, generator=torch.Generator().manual_seed(7))
    return torch.randn(n_tokens, 12, generator=generator) @ mixing + 0.5


def statistics_of(inputs: torch.Tensor) -> InputStatistics:
    gram = inputs.T @ inputs / len(inputs)
    return InputStatistics(len(inputs), inputs.mean(0), inputs.square().mean(0), inputs.norm(dim=0), gram)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(4, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def lost(weight: torch.Tensor, refit: torch.Tensor, inputs: torch.Tensor) -> float:
    dense = inputs.double() @ weight.T
    return (dense - inputs.double()[:, : refit.shape[1]] @ refit.T).square().mean().item()


def test_ridge_is_the_least_squares_fit_of_the_dense_outputs(weight):
    inputs = drawn(64)
    for width, (refit, bias) in zip(WIDTHS, ridge_refits(weight, statistics_of(inputs), WIDTHS, 1e-9), strict=True):
        kept, dense = inputs.double()[:, :width], inputs.double() @ weight.T
        expected = torch.linalg.lstsq(kept, dense).solution.T
        assert torch.allclose(refit, expected, atol=1e-4) and bias is None


def test_ridge_is_the_formula_of_its_docstring(weight):
    inputs, width = drawn(64).double(), 5
    gram = inputs.T @ inputs / 64
    strength = 0.3 * gram.diagonal().mean()
    kept, crossed = gram[:width, :width] + strength * torch.eye(width).double(), gram[width:, :width]
    expected = weight[:, :width] + weight[:, width:] @ crossed @ torch.linalg.inv(kept)
    refit, _ = next(ridge_refits(weight, statistics_of(drawn(64)), [width], 0.3))
    assert torch.allclose(refit, expected, atol=1e-4)


def test_a_ridge_without_end_leaves_the_kept_columns_as_they_are(weight):
    refit, _ = next(ridge_refits(weight, statistics_of(drawn(64)), [5], 1e12))
    assert torch.allclose(refit, weight[:, :5], atol=1e-6)


def test_bias_adds_what_the_dropped_inputs_add_on_the_mean(weight):
    inputs = drawn(64)
    for width, (refit, bias) in zip(WIDTHS, bias_refits(weight, statistics_of(inputs), WIDTHS), strict=True):
        assert torch.equal(refit, weight[:, :width])
        error = inputs.double() @ weight.T - (inputs.double()[:, :width] @ refit.T + bias)
        assert torch.allclose(error.mean(0), torch.zeros(4).double(), atol=1e-5)


def test_procrustes_turns_the_outputs_by_the_best_orthogonal_matrix(weight):
    inputs = drawn(64)
    for width, (refit, _) in zip(WIDTHS, procrustes_refits(weight, statistics_of(inputs), WIDTHS), strict=True):
        turned = torch.linalg.lstsq(weight[:, :width].T, refit.T).solution.T if width >= 4 else None
        if turned is not None:
            assert torch.allclose(turned @ turned.T, torch.eye(4).double(), atol=1e-6)
        best = lost(weight, refit, inputs)
        assert best < lost(weight, weight[:, :width], inputs)
        for seed in range(20):  # no other rotation of the kept columns does better
            other, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)).double())
            assert best <= lost(weight, other @ weight[:, :width], inputs)


def test_ridge_loses_less_than_procrustes_and_that_less_than_nothing(weight):
    inputs, statistics = drawn(64), statistics_of(drawn(64))
    for index, width in enumerate(WIDTHS):
        by_ridge, by_turning = (
            list(refits(weight, statistics, WIDTHS))[index][0] for refits in (ridge_refits, procrustes_refits)
        )
        losses = [lost(weight, refit, inputs) for refit in (by_ridge, by_turning, weight[:, :width])]
        assert losses == sorted(losses)


def test_a_singular_system_is_refused(weight):
    with pytest.raises(CompensationFailed, match=r"of 12 channels are singular with a ridge of 0\.0"):
        list(ridge_refits(weight, statistics_of(drawn(5)), WIDTHS, 0.0))


@pytest.mark.parametrize("n_tokens", [8, 4000])
def test_the_ridge_is_the_one_that_loses_least_on_other_text(weight, n_tokens):
    fitted, other = statistics_of(drawn(n_tokens)), drawn(4000, seed=3)
    losses = {ridge: lost(weight, next(ridge_refits(weight, fitted, [6], ridge))[0], other) for ridge in RIDGES}
    assert best_ridge(weight, fitted, statistics_of(other)) == min(losses, key=losses.__getitem__)


def test_statistics_of_two_texts_are_those_of_both():
    inputs = drawn(30)
    both = merged(statistics_of(inputs[:10]), statistics_of(inputs[10:]))
    assert both.n_tokens == 30
    for name in ("mean", "second_moment", "gram"):
        assert torch.allclose(getattr(both, name), getattr(statistics_of(inputs), name), atol=1e-5)
