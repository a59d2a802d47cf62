"""The order of parts inside a site by elimination: drop what costs least, refit the others, and again."""

import torch

from rap_env.components import ATTENTION
from rap_env.llm.architecture import DecoderLayer
from rap_env.widths.compensation import factor_of

OBS = "obs"
_RIDGE = 0.01  # of the second moments, in mean diagonal entries
_CHANNELS = 16  # of an MLP that go in one step


def elimination_order(
    layer: DecoderLayer, kind: str, weight: torch.Tensor, gram: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a site has in the opposite order of its elimination: KV heads, one a step, or MLP channels, several a step.

    Args:
        layer: Has the site.
        kind: Of the site.
        weight: Its output matrix [H, C].
        gram: X^T X / n of that matrix's inputs [C, C].

    Returns:
        The order, and what each input cost [C]; see `eliminate`.

    Raises:
        CompensationFailed: The second moments are singular.
    """
    size, at_once = (layer.output_slices(kind)[0].stop, 1) if kind == ATTENTION else (1, _CHANNELS)
    order, costs = eliminate(weight.double(), gram.double(), size, at_once)
    return order.flip(0), costs


def eliminate(
    weight: torch.Tensor, gram: torch.Tensor, size: int, at_once: int, ridge: float = _RIDGE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Optimal-brain-surgeon elimination of all inputs (OSSCAR, arXiv 2403.12983), exact within a step.

    With A = (G + r I)^-1 dropping the inputs S and refitting the others costs tr(W_S A_SS^-1 W_S^T). What is left is
    W - W_S A_SS^-1 A_S: and A - A_:S A_SS^-1 A_S:. With A_SS = L L^T that is Y^T Y for Y = L^-1 W_S^T, whose rows say
    what each input of S costs after those before it.

    Args:
        weight: W [H, C] in float64.
        gram: G [C, C] in float64.
        size: Inputs that go together: those of a KV head, or 1.
        at_once: How many times as many go in one step: those that would cost least alone.
        ridge: r in mean diagonal entries of G.

    Returns:
        Groups of `size` inputs in the order in which they went, and what each input cost when it did [C]: sums say by
        how much the output's mean squared error rose, the ridge's part of it included.

    Raises:
        CompensationFailed: G + r I is singular.
    """
    inverse, left = torch.cholesky_inverse(factor_of(gram, ridge)), torch.arange(len(gram) // size).to(gram.device)
    within, costs, order = torch.arange(size).to(left), torch.zeros(len(gram)).to(gram), []
    while len(left):
        alone = _costs_alone(weight, inverse, size)
        ranked = alone.argsort(stable=True)
        going, staying = ranked[:at_once], ranked[at_once:].sort().values
        goes, stays = ((groups[:, None] * size + within).flatten() for groups in (going, staying))
        factor = torch.linalg.cholesky(inverse[goes][:, goes])
        lost = torch.linalg.solve_triangular(factor, weight[:, goes].T, upper=False)  # [S, H]
        shared = torch.linalg.solve_triangular(factor, inverse[goes][:, stays], upper=False)  # [S, C that stay]
        costs[(left[going][:, None] * size + within).flatten()] = lost.square().sum(1)
        weight = weight[:, stays] - lost.T @ shared
        inverse = inverse[stays][:, stays] - shared.T @ shared
        order.append(left[going])
        left = left[staying]
    return torch.cat(order), costs


def _costs_alone(weight: torch.Tensor, inverse: torch.Tensor, size: int) -> torch.Tensor:
    """What each group of inputs would cost if it went alone."""
    n_groups = len(inverse) // size
    blocks = inverse.view(n_groups, size, n_groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    own = weight.view(-1, n_groups, size).permute(1, 2, 0)  # [groups, size, H]
    lost = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), own, upper=False)
    return lost.square().sum((1, 2))
