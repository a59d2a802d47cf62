"""What each site is worth alone: a curve of loss over its width, with all other sites whole."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rap_env.evaluation.meter import Meter
from rap_env.mask import PruningMask

_COARSEST = 2  # levels, that a reserve leads to


@dataclass(frozen=True)
class SiteCurves:
    """What narrowing each site alone costs: measured at some widths, linear between them.

    Attributes:
        known: Scores of all masks that were measured: the dense one, and single narrow sites.
        levels: Measured widths of a site besides all its parts, at most.
    """

    known: Mapping[PruningMask, float]
    levels: int

    @functools.cached_property
    def dense(self) -> PruningMask:
        return next(mask for mask in self.known if not mask.dropped)

    @functools.cached_property
    def increases(self) -> tuple[tuple[float, ...], ...]:
        """For each site, by how much the score falls at a width of 0, 1 ... all parts; negative where it rises."""
        top = self.known[self.dense]
        curves = []
        for place, (_site, points) in enumerate(_single_sites(self.dense, self.levels)):
            widths = [mask.widths[place] for mask in points]
            n_parts = self.dense.widths[place]
            falls = [top - self.known[mask] for mask in points]
            curve = np.interp(np.arange(n_parts + 1), [*widths, n_parts], [*falls, 0.0])
            curves.append(tuple(curve.tolist()))
        return tuple(curves)

    @property
    def costs(self) -> dict[str, float]:
        """What each component adds on its site's curve when it goes after those behind it, by name."""
        steps = (narrow - wide for curve in self.increases for narrow, wide in pairwise(curve))
        return dict(zip((component.name for component in self.dense.components), steps, strict=True))


def measure_site_curves(meter: Meter, levels: int, reserve: int = 0) -> SiteCurves:
    """Measures every site alone at up to so many widths, spread evenly; sites of fewer parts at each width.

    With 4 levels that are 210 masks for 30 layers with 3 KV heads and 24 groups of channels each, and the dense model.
    Where the token budget does not pay for so many levels, there are as many as it pays for.

    Args:
        meter: Evaluates, and pays.
        levels: Widths of a site, all its parts not counted.
        reserve: Evaluations that the token budget is still to pay for afterwards, down to two levels: a single one is
            too coarse for what begins with the curves.

    Raises:
        SearchExhausted: What is left does not cover one level.
        ValueError: No level is asked for.
    """
    if levels < 1:
        raise ValueError(f"expected at least one level; got {levels}")
    dense = PruningMask.all_kept(meter.llm.shape)
    masks = _masks(dense, levels)
    while levels > 1 and (len(masks) + reserve * (levels > _COARSEST)) * meter.tokens_each > meter.budget.left:
        levels -= 1
        masks = _masks(dense, levels)
    scores = (each.score for each in meter.evaluate(masks))
    return SiteCurves(dict(zip(masks, scores, strict=True)), levels)


def _masks(dense: PruningMask, levels: int) -> list[PruningMask]:
    return [dense, *(mask for _site, points in _single_sites(dense, levels) for mask in points)]


def _single_sites(dense: PruningMask, levels: int) -> list[tuple[str, list[PruningMask]]]:
    """For each site masks in which it alone is narrow, the narrowest first."""
    points = []
    for site, own in dense.components.sites:
        parts = dense.components[own]
        widths = np.unique(np.linspace(0, len(parts), min(levels, len(parts)) + 1).round().astype(int))[:-1]
        points.append((site.name, [dense.drop(*parts[width:]) for width in widths.tolist()]))
    return points
