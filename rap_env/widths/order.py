"""The order of parts inside a site: by a score, so that the first parts are worth most and widths are nested."""

from collections.abc import Callable, Mapping

import torch

from rap_env.components import ATTENTION
from rap_env.llm.architecture import DecoderLayer
from rap_env.widths.statistics import InputStatistics

Score = Callable[[InputStatistics, torch.Tensor], torch.Tensor]  # of the inputs [C] of an output matrix [H, C]


def wanda(statistics: InputStatistics, weight: torch.Tensor) -> torch.Tensor:
    """Mean square of a channel times the squared norm of its column: Wanda's score (arXiv 2306.11695), of columns.

    It is by how much the mean squared output differs without the channel, where channels do not correlate.
    """
    return statistics.second_moment * weight.square().sum(0)


def flap(statistics: InputStatistics, weight: torch.Tensor) -> torch.Tensor:
    """Variance of a channel times the squared norm of its column (FLAP, arXiv 2312.11983)."""
    return statistics.variance * weight.square().sum(0)


def two_ssp(statistics: InputStatistics, weight: torch.Tensor) -> torch.Tensor:
    """Norm of a channel over a window, mean over the windows, whatever the weights (2SSP, arXiv 2501.17771)."""
    return statistics.window_norm


SCORES: Mapping[str, Score] = {"wanda": wanda, "flap": flap, "2ssp": two_ssp}


def order_of(layer: DecoderLayer, kind: str, scores: torch.Tensor) -> torch.Tensor:
    """What a site has of the highest scores first: its KV heads, by the sums of their channels', or its MLP channels.

    Args:
        layer: Has the site.
        kind: Of the site.
        scores: Of the inputs of its output matrix [C].
    """
    if kind == ATTENTION:
        scores = torch.stack([scores[own].sum() for own in layer.output_slices(kind)])
    return scores.argsort(descending=True, stable=True)


def reorder(layer: DecoderLayer, kind: str, order: torch.Tensor) -> None:
    """Gives a site's parts another order; the site stays the same function but for rounding.

    Its output matrix [H, C] is stored by columns then, so that the first inputs are one piece of memory, as the first
    rows of the other matrices are.

    Args:
        layer: Its weights are replaced.
        kind: Of the site.
        order: Where each KV head, with the query heads that read it, or each MLP channel stood before.
    """
    for path, (dim, _own) in next(iter(layer.cuts(kind).values())).items():
        linear = layer.module.get_submodule(path)
        places = _places(layer, kind, path, order).to(linear.weight.device)
        if dim == 1:
            linear.weight.data = linear.weight.data.T.index_select(0, places).T
            continue
        linear.weight.data = linear.weight.data.index_select(0, places)
        if linear.bias is not None:
            linear.bias.data = linear.bias.data[places]


def input_places(layer: DecoderLayer, kind: str, order: torch.Tensor) -> torch.Tensor:
    """Where the inputs [C] of a site's output matrix stand before it is reordered."""
    return _places(layer, kind, layer.output_path(kind), order)


def _places(layer: DecoderLayer, kind: str, path: str, order: torch.Tensor) -> torch.Tensor:
    if kind != ATTENTION:
        return order
    slices = [cut[path][1] for cut in layer.cuts(kind).values()]
    return torch.cat([torch.arange(slices[head].start, slices[head].stop) for head in order.tolist()])
