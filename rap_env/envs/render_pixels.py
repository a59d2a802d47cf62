"""An environment's state as an image: no display, no global state. Only this module needs matplotlib."""

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from rap_env.components import ATTENTION, KINDS
from rap_env.envs.render import (
    LABELS,
    Scene,
    describe_accuracy,
    describe_fit,
    format_bytes,
    kept_shares,
)
from rap_env.mask import PruningMask

WIDTH_PIXELS, HEIGHT_PIXELS = 1000, 500  # even numbers, which video codecs insist on
_DPI = 100

# Okabe and Ito's palette, which stays distinct in all common kinds of colour blindness.
_ATTENTION_COLOUR, _MLP_COLOUR = "#0072B2", "#009E73"
_WEIGHTS_COLOUR, _KV_CACHE_COLOUR, _OVERSHOOT_COLOUR = "#E69F00", "#56B4E9", "#D55E00"
_DROPPED_COLOUR, _HATCH_COLOUR = "#F2F2F2", "#BDBDBD"
_TEXT_COLOUR, _FAINT_COLOUR = "#222222", "#666666"
_COLOURS = dict(zip(KINDS, (_ATTENTION_COLOUR, _MLP_COLOUR), strict=True))


def _blend(colour: str, share: float) -> tuple[float, ...]:
    """A colour mixed with that of dropped components, so that a layer kept in part is paler."""
    full, empty = (np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)]) / 255 for code in (colour, _DROPPED_COLOUR))
    return tuple(share * full + (1 - share) * empty)


def _strip_axes(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelsize=10, labelcolor=_TEXT_COLOUR)


def _legend(axes: Axes, handles: list[Patch], loc: str, anchor: tuple[float, float]) -> None:
    axes.legend(
        handles=handles,
        loc=loc,
        bbox_to_anchor=anchor,
        ncols=len(handles),
        frameon=False,
        fontsize=10,
        handlelength=1.4,
        handleheight=1.0,
        columnspacing=1.6,
        borderaxespad=0,
        borderpad=0,
    )


def _draw_components(axes: Axes, mask: PruningMask) -> None:
    """The heat strip: a column for each layer, a row for each kind of site."""
    shares = kept_shares(mask)
    n_layers = len(shares[ATTENTION])
    gap = min(n_layers / 800, 0.15)  # half a gap of 2 pixels
    for row, kind in enumerate(KINDS):
        for hatch, layers in (("", np.flatnonzero(shares[kind])), ("////", np.flatnonzero(shares[kind] == 0))):
            axes.broken_barh(
                [(layer + gap, 1 - 2 * gap) for layer in layers],
                (row + 0.03, 0.94),
                facecolors=[_blend(_COLOURS[kind], share) for share in shares[kind][layers]],
                edgecolors=_HATCH_COLOUR,
                linewidths=0,
                hatch=hatch,
            )
    axes.set(xlim=(0, n_layers), ylim=(len(KINDS), 0), xlabel="layer", xticks=[])
    axes.set_yticks([row + 0.5 for row in range(len(KINDS))], [LABELS[kind] for kind in KINDS])
    for layer in range(0, n_layers, 1 + (n_layers - 1) // 40):  # about 20 pixels for each number
        # plain text takes a third of the time of tick labels
        axes.text(layer + 0.5, 2.1, str(layer), ha="center", va="top", fontsize=10, color=_TEXT_COLOUR)
    axes.xaxis.label.set(color=_FAINT_COLOUR, fontsize=10)
    axes.xaxis.labelpad = 20
    _strip_axes(axes)
    _legend(
        axes,
        [
            *(Patch(facecolor=_COLOURS[kind], label=f"{LABELS[kind]} kept") for kind in KINDS),
            Patch(facecolor=_DROPPED_COLOUR, edgecolor=_HATCH_COLOUR, hatch="////", linewidth=0, label="dropped"),
        ],
        "lower right",
        (1.0, 1.06),
    )


def _draw_footprint(axes: Axes, scene: Scene) -> None:
    """The stacked bar of bytes, the dense model's outline, and the budget as a line."""
    weights, kv_cache = scene.footprint.weights_bytes, scene.footprint.kv_cache_bytes
    axes.barh(0, weights, color=_WEIGHTS_COLOUR, height=0.8)
    axes.barh(0, kv_cache, left=weights, color=_KV_CACHE_COLOUR, height=0.8)
    outline = {"fill": False, "edgecolor": _FAINT_COLOUR, "linestyle": (0, (4, 2))}
    axes.barh(0, scene.dense_bytes, linewidth=1.0, height=0.8, **outline)
    if scene.overshoot_bytes > 0:
        over = {"hatch": "xx", "edgecolor": _OVERSHOOT_COLOUR, "linewidth": 0}
        axes.barh(0, scene.overshoot_bytes, left=scene.budget_bytes, fill=False, height=0.8, **over)
    for colour, width in (("white", 5), (_TEXT_COLOUR, 2.5)):  # the white one keeps the line off the bar's colours
        axes.plot([scene.budget_bytes] * 2, [-0.6, 0.6], color=colour, linewidth=width, solid_capstyle="butt")
    on_the_right = scene.budget_bytes > scene.axis_bytes / 2
    axes.annotate(
        f"budget {format_bytes(scene.budget_bytes)}",
        (scene.budget_bytes, -0.6),
        xytext=(1.5 if on_the_right else -1.5, -3),
        textcoords="offset points",
        ha="right" if on_the_right else "left",
        va="top",
        color=_TEXT_COLOUR,
        fontsize=10,
        fontweight="bold",
    )
    axes.set(xlim=(0, 1.01 * scene.axis_bytes), ylim=(-0.65, 0.65), xticks=[], yticks=[])
    _strip_axes(axes)
    _legend(
        axes,
        [
            Patch(color=_WEIGHTS_COLOUR, label=f"weights {format_bytes(weights)}"),
            Patch(color=_KV_CACHE_COLOUR, label=f"KV cache {format_bytes(kv_cache)}"),
            Patch(**outline, label=f"dense {format_bytes(scene.dense_bytes)}"),
        ],
        "upper left",
        (0.0, -0.4),
    )


def render_rgb(scene: Scene) -> np.ndarray:
    """Draws a scene as an image, uint8 [500, 1000, 3]; every scene has the same size."""
    figure = Figure(figsize=(WIDTH_PIXELS / _DPI, HEIGHT_PIXELS / _DPI), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    left, right = 0.09, 0.97
    heading = {"fontsize": 15, "fontweight": "bold", "color": _TEXT_COLOUR, "va": "top"}
    caption = {"fontsize": 12, "fontweight": "bold", "color": _TEXT_COLOUR, "va": "bottom"}
    figure.text(left, 0.95, str(scene.workload), **heading)
    reward = "no reward yet" if scene.reward is None else f"reward {scene.reward:+.3f}"
    figure.text(right, 0.95, reward, ha="right", **heading)

    figure.text(left, 0.80, str(scene.mask), **caption)
    _draw_components(figure.add_axes((left, 0.54, right - left, 0.245)), scene.mask)

    caption["color"] = _OVERSHOOT_COLOUR if scene.overshoot_bytes > 0 else _TEXT_COLOUR
    figure.text(left, 0.375, f"{format_bytes(scene.footprint.peak_bytes)}, {describe_fit(scene)}", **caption)
    _draw_footprint(figure.add_axes((left, 0.235, right - left, 0.13)), scene)

    accuracy = describe_accuracy(scene).replace(" ", "\N{NO-BREAK SPACE}").replace(",\N{NO-BREAK SPACE}", ", ")
    lines = textwrap.wrap(f"accuracy: {accuracy}", width=112, max_lines=2, placeholder=" ...")
    figure.text(left, 0.10, "\n".join(lines), fontsize=10, color=_TEXT_COLOUR, va="top", linespacing=1.4)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
