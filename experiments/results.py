"""From rows to the tables and pictures that a run shows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

GB = 1e9


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over the scenarios for each policy; violations are counted. With text, `accuracy` is minus the loss."""
    summary = {}
    for name in dict.fromkeys(row["policy"] for row in rows):
        own = [row for row in rows if row["policy"] == name]
        summary[name] = {
            "budget_gb": float(np.mean([row["budget_bytes"] for row in own])) / GB,
            "footprint_gb": float(np.mean([row["footprint"]["peak_bytes"] for row in own])) / GB,
            "accuracy": float(np.mean([row["score"] for row in own])),
            "reward": float(np.mean([row["reward"] for row in own])),
            "violations": sum(row["violation"] for row in own),
            "scenarios": len(own),
        }
        if all("smooth_accuracy" in row["reward_terms"] for row in own):
            smooth = [row["reward_terms"]["smooth_accuracy"] for row in own]
            summary[name]["smooth_accuracy"] = float(np.mean(smooth))
    return summary


def summary_table(summary: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the closing table."""
    by_text = not any("smooth_accuracy" in means for means in summary.values())
    scores = (
        {"minus the loss": "accuracy"} if by_text else {"accuracy": "accuracy", "smooth accuracy": "smooth_accuracy"}
    )
    columns = ["policy", "budget GB", "footprint GB", *scores, "reward", "violations"]
    cells = [
        [
            name,
            f"{means['budget_gb']:.3f}",
            f"{means['footprint_gb']:.3f}",
            *(f"{means[key]:.3f}" for key in scores.values()),
            f"{means['reward']:.3f}",
            f"{means['violations']} of {means['scenarios']}",
        ]
        for name, means in summary.items()
    ]
    return columns, cells


def mask_picture(rows: Sequence[Mapping[str, Any]], shape, policy: str) -> np.ndarray:
    """Heat map of what a policy keeps: components by scenario, uint8 [height, width, 3]."""
    own = [row for row in rows if row["policy"] == policy]
    names = [component.name for component in shape.components]
    kept = np.array([[name not in row["dropped"] for name in names] for row in own], dtype=float)
    figure = Figure(figsize=(max(8.0, 0.16 * len(names)), 1.6 + 0.3 * len(own)), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, kind, offset in zip(figure.subplots(1, 2), ("attention", "MLP"), (0, 1), strict=True):
        axes.imshow(kept[:, offset::2], aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"{kind}: kept (light) or dropped (dark)", fontsize=10)
        axes.set_xlabel("layer")
        axes.set_yticks([])
    labels = [f"{row['batch_size']} x {row['prompt_tokens']}, {row['budget_ratio']:.0%}" for row in own]
    figure.axes[0].set_yticks(range(len(own)), labels, fontsize=8)
    figure.axes[0].set_ylabel("sequences x prompt tokens, memory budget")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
