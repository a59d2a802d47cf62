"""Compensation: output matrices that make up for the parts that a site dropped, in closed form from second moments.

Letters: a site's output matrix W [H, C] has C inputs X [n tokens, C], of which the first are kept (K) and the others
pruned (P). G is X^T X / n over calibration text, m the mean of X.
"""

from collections.abc import Iterator, Sequence

import torch

from rap_env.errors import CompensationFailed
from rap_env.widths.statistics import InputStatistics

RIDGES = (0.001, 0.01, 0.1, 1.0)  # what `ridge` is chosen from, in mean diagonal entries of G

Refit = tuple[torch.Tensor, torch.Tensor | None]  # the kept part of an output matrix [H, K], and its bias [H]


def bias_refits(weight: torch.Tensor, statistics: InputStatistics, widths: Sequence[int]) -> Iterator[Refit]:
    """W_K as it is, and what the pruned inputs add on the mean as a bias: W_P m_P (FLAP, arXiv 2312.11983).

    Args:
        weight: W [H, C] in float64.
        statistics: Of its inputs.
        widths: Numbers of kept inputs K.
    """
    mean = statistics.mean.double()
    for kept in widths:
        yield weight[:, :kept], weight[:, kept:] @ mean[kept:]


def ridge_refits(
    weight: torch.Tensor, statistics: InputStatistics, widths: Sequence[int], ridge: float = 0.01
) -> Iterator[Refit]:
    """The least-squares fit of the dense outputs, drawn towards W_K: W_K + W_P G_PK (G_KK + r I)^-1.

    r is `ridge` times the mean diagonal entry of G. One Cholesky factor of G + r I serves all widths: its leading block
    is that of the kept inputs.

    Args:
        weight: W [H, C] in float64.
        statistics: Of its inputs, with their gram matrix.
        widths: Numbers of kept inputs K.
        ridge: How strongly it is drawn; near 0 this is the plain fit of OSSCAR (arXiv 2403.12983).

    Raises:
        CompensationFailed: G + r I is singular.
    """
    gram = statistics.gram.double()
    factor = factor_of(gram, ridge)
    for kept in widths:
        pruned = weight[:, kept:] @ gram[kept:, :kept]
        yield weight[:, :kept] + torch.cholesky_solve(pruned.T, factor[:kept, :kept]).T, None


def factor_of(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """The Cholesky factor of G + r I.

    Args:
        gram: G [C, C] in float64.
        ridge: r in mean diagonal entries of G.

    Raises:
        CompensationFailed: G + r I is singular.
    """
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)).to(gram))
    if failed or not torch.isfinite(factor).all():
        raise CompensationFailed(
            f"the second moments of {len(gram)} channels are singular with a ridge of {ridge}: give it a larger one, or"
            " more calibration text"
        )
    return factor


def procrustes_refits(weight: torch.Tensor, statistics: InputStatistics, widths: Sequence[int]) -> Iterator[Refit]:
    """The kept outputs turned towards the dense ones by an orthogonal matrix: Q W_K (RCPU, arXiv 2510.07782).

    Q = U V^T from the singular value decomposition U S V^T of Y^T Y_K = W G_:K W_K^T.

    Args:
        weight: W [H, C] in float64.
        statistics: Of its inputs, with their gram matrix.
        widths: Numbers of kept inputs K.
    """
    gram = statistics.gram.double()
    for kept in widths:
        left, _, right = torch.linalg.svd(weight @ gram[:, :kept] @ weight[:, :kept].T)
        yield left @ right @ weight[:, :kept], None


COMPENSATIONS = {"bias": bias_refits, "ridge": ridge_refits, "procrustes": procrustes_refits}


def best_ridge(weight: torch.Tensor, fitted: InputStatistics, held_out: InputStatistics) -> float:
    """The one of `RIDGES` whose refit to half of the inputs loses least of the output's square on other text.

    Args:
        weight: W [H, C] in float64.
        fitted: Statistics that the refit is made from.
        held_out: Those of other text.
    """
    half, gram = weight.shape[1] // 2, held_out.gram.double()
    lost = {}
    for ridge in RIDGES:
        try:
            refit, _ = next(ridge_refits(weight, fitted, [half], ridge))
        except CompensationFailed:
            continue
        missing = torch.cat([refit - weight[:, :half], -weight[:, half:]], 1)
        lost[ridge] = ((missing @ gram) * missing).sum().item()
    if not lost:
        raise CompensationFailed(
            f"the second moments of {len(gram)} channels are singular: give it more calibration text"
        )
    return min(lost, key=lost.__getitem__)
