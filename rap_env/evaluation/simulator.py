"""Predicts the loss of widths that nobody measured, from those that were: a sum over sites and bumps around masks."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

_OFFSET = 0.3  # nats: losses are fitted as log(loss - dense loss + this), so that small ones count
_BUMPS = 384  # measured masks that bumps stand around
_SCALE = 1.5  # of a bump, in sites' worth of dropped parts
_RIDGE = 1e-5


@dataclass(frozen=True)
class Simulator:
    """A ridge regression of log(loss over dense + 0.3) on each site's width and on Gaussian bumps around masks.

    Where less is kept nowhere was measured to be better, it is not predicted either: see `floor`.

    Shapes: N masks, S sites, W the most parts of a site + 1, K bumps.

    Attributes:
        n_parts: Parts of each site [S].
        is_attention: Which sites are attentions [S].
        dense_loss: Loss of the dense model, in nats.
        sites: What each width of each site adds to the logarithm [S, W].
        centres: Dropped fractions of the masks that bumps stand around [K, S].
        weights: What each bump adds [K].
        floor: Lowest loss that was measured with at most so many attention parts and so many MLP parts kept; minus
            infinity where nothing as small was measured [attention parts + 1, MLP parts + 1].

    Raises:
        ValueError: An array has another shape, or holds no numbers.
    """

    n_parts: np.ndarray
    is_attention: np.ndarray
    dense_loss: float
    sites: np.ndarray
    centres: np.ndarray
    weights: np.ndarray
    floor: np.ndarray

    def __post_init__(self) -> None:
        n_sites, n_bumps = len(self.n_parts), len(self.weights)
        by_kind = [1 + int(self.n_parts[kind].sum()) for kind in (self.is_attention, ~self.is_attention)]
        sizes = {"n_parts": (n_sites,), "is_attention": (n_sites,), "sites": (n_sites, 1 + int(self.n_parts.max()))}
        sizes |= {"centres": (n_bumps, n_sites), "weights": (n_bumps,), "floor": tuple(by_kind)}
        for name, shape in sizes.items():
            values = getattr(self, name)
            if values.shape != shape or values.dtype.kind not in "biuf":
                raise ValueError(f"{name}: expected numbers {list(shape)}; got {values.dtype} {list(values.shape)}")
        own = {"_rows": np.arange(len(self.n_parts)), "_lengths": (self.centres**2).sum(axis=1)}
        own |= {"_counted": np.stack([self.is_attention, ~self.is_attention], axis=1).astype(np.int64)}
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def losses(self, widths: np.ndarray, with_floor: bool = True) -> np.ndarray:
        """Predicted losses [N] of widths [N, S], in nats.

        Args:
            widths: Kept parts of each site.
            with_floor: Whether nothing is predicted to be better than what was measured with as little kept.
        """
        widths = widths.astype(np.int64)
        dropped = 1.0 - widths / self.n_parts
        added = self.sites[self._rows, widths].sum(axis=1) + bumps(dropped, self.centres, self._lengths) @ self.weights
        losses = np.exp(added) - _OFFSET + self.dense_loss
        if not with_floor:
            return losses
        attentions, mlps = (widths @ self._counted).T
        return np.maximum(losses, self.floor[attentions, mlps])

    def arrays(self) -> dict[str, np.ndarray]:
        """What `from_arrays` builds the same from, by name."""
        return {each.name: np.asarray(getattr(self, each.name)) for each in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Simulator":
        values = {each.name: arrays[each.name] for each in fields(cls)}
        return cls(**{**values, "dense_loss": float(values["dense_loss"])})


def bumps(dropped: np.ndarray, centres: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Gaussian bumps [N, K] of dropped fractions [N, S] around centres [K, S] of squared lengths [K]."""
    distances = (dropped**2).sum(axis=1)[:, None] + lengths - 2.0 * dropped @ centres.T
    return np.exp(distances * (-0.5 / _SCALE**2))


def site_features(dropped: np.ndarray) -> np.ndarray:
    """What a dropped fraction is fitted with: itself, its 2nd and 4th power, and whether all is gone [..., 4]."""
    return np.stack([dropped, dropped**2, dropped**4, dropped == 1.0], axis=-1)


def fitted(
    widths: np.ndarray, losses: np.ndarray, n_parts: np.ndarray, is_attention: np.ndarray, dense_loss: float
) -> Simulator:
    """Fits a simulator to measured masks.

    Args:
        widths: Kept parts of each site [N, S].
        losses: Their losses [N], in nats.
        n_parts: Parts of each site [S].
        is_attention: Which sites are attentions [S].
        dense_loss: That of the dense model.
    """
    dropped = 1.0 - widths / n_parts
    chosen = np.random.default_rng(0).permutation(len(widths))[:_BUMPS]
    centres = dropped[np.sort(chosen)]
    of_sites = site_features(dropped).reshape(len(widths), -1)
    columns = np.concatenate([of_sites, bumps(dropped, centres, (centres**2).sum(axis=1))], axis=1)
    mean, deviation = columns.mean(axis=0), columns.std(axis=0) + 1e-9
    of_bumps = slice(of_sites.shape[1], None)
    deviation[of_bumps] = deviation[of_bumps].mean() / 3.0  # of all bumps the same: wide ones count
    scaled = (columns - mean) / deviation
    wanted = np.log(np.maximum(losses - dense_loss, -0.9 * _OFFSET) + _OFFSET)
    ridge = _RIDGE * len(widths) * np.eye(columns.shape[1])
    slopes = np.linalg.solve(scaled.T @ scaled + ridge, scaled.T @ (wanted - wanted.mean())) / deviation
    level = wanted.mean() - mean @ slopes
    all_widths = np.minimum(np.arange(n_parts.max() + 1)[None], n_parts[:, None])  # a site has no more than all
    by_width = site_features(1.0 - all_widths / n_parts[:, None])
    sites = np.einsum("swf,sf->sw", by_width, slopes[: of_sites.shape[1]].reshape(len(n_parts), -1))
    sites += level / len(n_parts)
    floor = lowest_losses(widths, losses, n_parts, is_attention)
    return Simulator(n_parts, is_attention, dense_loss, sites, centres, slopes[of_sites.shape[1] :], floor)


def lowest_losses(widths: np.ndarray, losses: np.ndarray, n_parts: np.ndarray, is_attention: np.ndarray) -> np.ndarray:
    """`Simulator.floor`; arguments as those of `fitted`."""
    kinds = is_attention, ~is_attention
    floor = np.full([1 + n_parts[kind].sum() for kind in kinds], np.inf)
    np.minimum.at(floor, tuple(widths[:, kind].sum(axis=1) for kind in kinds), losses)
    for axis in range(2):
        floor = np.minimum.accumulate(floor, axis=axis)
    return np.where(np.isfinite(floor), floor, -np.inf)
