"""What there is to see of an environment's state, and its picture as text. Pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rap_env.components import ATTENTION, KINDS
from rap_env.mask import PruningMask
from rap_env.memory.footprint import Footprint
from rap_env.memory.workload import Workload

_BAR_CHARACTERS = 60
LABELS = dict(zip(KINDS, ("attention", "MLP"), strict=True))


@dataclass(frozen=True)
class Scene:
    """What there is to see in an environment.

    Attributes:
        mask: The components kept so far.
        workload: The request batch.
        footprint: Predicted bytes of the masked model.
        dense_bytes: Predicted peak bytes of the unpruned model for the same workload.
        budget_bytes: The memory budget.
        reward: The last reward, or None before there is one.
        accuracy: Accuracy between 0 and 1 of each task; empty before there is one.
    """

    mask: PruningMask
    workload: Workload
    footprint: Footprint
    dense_bytes: int
    budget_bytes: int
    reward: float | None
    accuracy: Mapping[str, float]

    @property
    def overshoot_bytes(self) -> int:
        """Bytes above the budget; negative where the model fits."""
        return self.footprint.peak_bytes - self.budget_bytes

    @property
    def axis_bytes(self) -> int:
        """The largest of all the bytes that are drawn."""
        return max(self.footprint.peak_bytes, self.dense_bytes, self.budget_bytes, 1)


def format_bytes(n_bytes: int) -> str:
    """`1.23 GB`, `45.6 MB`, `7.8 kB` or `9 B`; 1 GB is 1e9 bytes."""
    for unit, size, digits in (("GB", 1e9, 2), ("MB", 1e6, 1), ("kB", 1e3, 1)):
        if n_bytes >= size:
            return f"{n_bytes / size:.{digits}f} {unit}"
    return f"{n_bytes} B"


def describe_fit(scene: Scene) -> str:
    """Whether the masked model fits the budget, and by how much."""
    if scene.overshoot_bytes > 0:
        return f"exceeds the budget by {format_bytes(scene.overshoot_bytes)}"
    return f"fits with {format_bytes(-scene.overshoot_bytes)} to spare"


def describe_accuracy(scene: Scene) -> str:
    return ", ".join(f"{task} {value:.1%}" for task, value in scene.accuracy.items()) or "not evaluated yet"


def kept_shares(mask: PruningMask) -> dict[str, np.ndarray]:
    """For each kind of site, the share of its components that every layer keeps, [layers].

    At granularity `block` a share is 0 or 1.
    """
    n_layers = 1 + max(component.site.layer for component in mask.components)
    kept, known = ({kind: np.zeros(n_layers) for kind in KINDS} for _ in range(2))
    for component, bit in zip(mask.components, mask.keep, strict=True):
        kept[component.site.kind][component.site.layer] += bit
        known[component.site.kind][component.site.layer] += 1
    return {kind: kept[kind] / np.maximum(known[kind], 1) for kind in KINDS}


def _glyph(share: float) -> str:
    return "#" if share == 1 else "." if share == 0 else "+"


def render_ansi(scene: Scene) -> str:
    """Draws a scene as plain text.

    One column a layer and one row for each kind of site: `#` is kept, `.` dropped, `+` kept in part. Below them
    the footprint, `=` for weights and `~` for the KV cache, with `-` up to the dense model and `^` at the budget.
    """
    shares = kept_shares(scene.mask)
    n_layers = len(shares[ATTENTION])
    cells = _BAR_CHARACTERS / scene.axis_bytes
    weights, peak, dense = (
        round(cells * n_bytes)
        for n_bytes in (scene.footprint.weights_bytes, scene.footprint.peak_bytes, scene.dense_bytes)
    )
    rows = [
        ("workload", str(scene.workload)),
        ("layer", "".join(f"{layer:<10}" for layer in range(0, n_layers, 10)).rstrip()),
        ("", "".join(str(layer % 10) for layer in range(n_layers))),
        *((LABELS[kind], "".join(_glyph(share) for share in shares[kind])) for kind in KINDS),
        ("", f"# kept, . dropped: {scene.mask}"),
        ("footprint", ("=" * weights + "~" * (peak - weights)).ljust(dense, "-")),
        ("", " " * round(cells * scene.budget_bytes) + "^ budget " + format_bytes(scene.budget_bytes)),
        ("", f"= weights {format_bytes(scene.footprint.weights_bytes)}"),
        ("", f"~ KV cache {format_bytes(scene.footprint.kv_cache_bytes)}"),
        ("", f"- freed from the dense model's {format_bytes(scene.dense_bytes)}"),
        ("total", f"{format_bytes(scene.footprint.peak_bytes)}, {describe_fit(scene)}"),
        ("accuracy", describe_accuracy(scene)),
        ("reward", "none yet" if scene.reward is None else f"{scene.reward:+.3f}"),
    ]
    return "\n".join(f"{label:<11}{text}".rstrip() for label, text in rows)
