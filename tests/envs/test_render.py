"""Text and pixel renderings show the mask, the footprint and the budget of a scene."""

import dataclasses
import subprocess
import sys
import time

import numpy as np
import pytest

from rap_env.components import KINDS, Component, Site
from rap_env.envs.render import Scene, format_bytes, kept_shares, render_ansi
from rap_env.envs.render_pixels import HEIGHT_PIXELS, WIDTH_PIXELS, render_rgb
from rap_env.mask import PruningMask
from rap_env.memory.footprint import Footprint
from rap_env.memory.workload import Workload

# What the picture's cells lie on at 30 layers: the strip spans 9% to 97% of the width, its rows 21.5% to 46% of the
# height from the top.
_CELL_WIDTH = 0.88 * WIDTH_PIXELS / 30
_ROW_PIXELS = {"attention": 140, "mlp": 200}


def whole_site(layer: int, kind: str) -> Component:
    return Component(f"layer{layer}.{kind}", Site(layer, kind), None, weight_bytes=1, kv_bytes_per_token=0)


def dense_mask(n_layers: int) -> PruningMask:
    components = tuple(whole_site(layer, kind) for layer in range(n_layers) for kind in KINDS)
    return PruningMask(components, (True,) * len(components))


@pytest.fixture
def scene() -> Scene:
    """30 layers without layer 3's attention and layer 11's MLP, 450 MB under a budget of 500 MB."""
    return Scene(
        mask=dense_mask(30).drop("layer3.attention", "layer11.mlp"),
        workload=Workload(8, 2048, 64),
        footprint=Footprint(weights_bytes=200_000_000, kv_cache_bytes=250_000_000, activation_bytes=1),
        dense_bytes=600_000_000,
        budget_bytes=500_000_000,
        reward=0.5,
        accuracy={"arc_easy": 0.612, "piqa": 0.7},
    )


def row(text: str, label: str) -> str:
    """The text behind a row's label."""
    return next(line.removeprefix(label).strip() for line in text.splitlines() if line.startswith(label))


def cell(pixels: np.ndarray, layer: int, kind: str) -> np.ndarray:
    """The inner pixels of one cell of the heat strip at 30 layers."""
    centre = round(0.09 * WIDTH_PIXELS + (layer + 0.5) * _CELL_WIDTH)
    return pixels[_ROW_PIXELS[kind] - 20 : _ROW_PIXELS[kind] + 20, centre - 8 : centre + 8]


def test_text_marks_dropped_components_in_their_row_and_column(scene):
    text = render_ansi(scene)
    assert row(text, "attention") == "###." + "#" * 26
    assert row(text, "MLP") == "#" * 11 + "." + "#" * 18


def test_text_numbers_the_columns(scene):
    lines = render_ansi(dataclasses.replace(scene, mask=dense_mask(102).drop("layer101.mlp"))).splitlines()
    ruler = next(index for index, line in enumerate(lines) if line.startswith("layer"))
    dropped_at = next(line for line in lines if line.startswith("MLP")).index(".")
    assert lines[ruler + 1][dropped_at] == "1"
    assert lines[ruler][dropped_at - 1 :] == "100"


def test_text_marks_a_layer_that_is_kept_in_part(scene):
    components = tuple(Component(f"layer0.{kind}.{i}", Site(0, kind), i, 1, 0) for kind in KINDS for i in range(2))
    mask = PruningMask(components, (True, False, True, True))
    text = render_ansi(dataclasses.replace(scene, mask=mask))
    assert (row(text, "attention"), row(text, "MLP")) == ("+", "#")
    assert {kind: list(share) for kind, share in kept_shares(mask).items()} == {"attention": [0.5], "mlp": [1.0]}


def test_text_bar_is_to_scale(scene):
    lines = render_ansi(scene).splitlines()
    bar = next(index for index, line in enumerate(lines) if line.startswith("footprint"))
    # 600 MB over 60 characters: 20 of weights, 25 of KV cache, 15 freed; the budget stands at 50
    assert lines[bar] == "footprint  " + "=" * 20 + "~" * 25 + "-" * 15
    assert lines[bar + 1] == " " * (11 + 50) + "^ budget 500.0 MB"


@pytest.mark.parametrize(
    ("budget_bytes", "wording"),
    [
        (500_000_000, "450.0 MB, fits with 50.0 MB to spare"),
        (450_000_000, "450.0 MB, fits with 0 B to spare"),
        (449_999_999, "450.0 MB, exceeds the budget by 1 B"),
        (300_000_000, "450.0 MB, exceeds the budget by 150.0 MB"),
    ],
)
def test_text_says_whether_the_budget_holds(scene, budget_bytes, wording):
    assert row(render_ansi(dataclasses.replace(scene, budget_bytes=budget_bytes)), "total") == wording


def test_text_gives_workload_parts_reward_and_accuracy(scene):
    text = render_ansi(scene)
    assert row(text, "workload") == "8 x 2048 + 64 tokens"
    assert "= weights 200.0 MB" in text
    assert "~ KV cache 250.0 MB" in text
    assert "dense model's 600.0 MB" in text
    assert row(text, "reward") == "+0.500"
    assert row(text, "accuracy") == "arc_easy 61.2%, piqa 70.0%"


def test_text_admits_that_nothing_was_measured_yet(scene):
    text = render_ansi(dataclasses.replace(scene, reward=None, accuracy={}))
    assert row(text, "reward") == "none yet"
    assert row(text, "accuracy") == "not evaluated yet"


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(0, "0 B"), (7_800, "7.8 kB"), (45_600_000, "45.6 MB"), (1_234_000_000, "1.23 GB")]
)
def test_bytes_are_written_in_decimal_units(n_bytes, text):
    assert format_bytes(n_bytes) == text


def test_picture_is_an_rgb_array_of_constant_size(scene):
    others = [
        dataclasses.replace(scene, mask=dense_mask(80)),
        dataclasses.replace(scene, reward=None, accuracy={f"long_task_name_{i}": 0.5 for i in range(40)}),
        dataclasses.replace(scene, budget_bytes=100, footprint=Footprint(0, 0, 0)),
    ]
    for pixels in map(render_rgb, [scene, *others]):
        assert (pixels.shape, pixels.dtype) == ((HEIGHT_PIXELS, WIDTH_PIXELS, 3), np.uint8)
        assert (pixels[[0, -1]] == 255).all() and (pixels[:, [0, -1]] == 255).all(), "something is cut at the border"


def test_picture_colours_kept_cells_and_hatches_dropped_ones(scene):
    pixels = render_rgb(scene)
    blue, green = (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73)
    assert (cell(pixels, 4, "attention") == blue).all()
    assert (cell(pixels, 3, "mlp") == green).all()
    for layer, kind in ((3, "attention"), (11, "mlp")):
        dropped = cell(pixels, layer, kind)
        assert dropped.min() > 150, "light"
        assert len(np.unique(dropped)) > 2, "hatched"


def test_picture_changes_only_where_the_mask_does(scene):
    before = render_rgb(dataclasses.replace(scene, mask=dense_mask(30).drop("layer5.mlp")))
    after = render_rgb(dataclasses.replace(scene, mask=dense_mask(30).drop("layer20.mlp")))
    rows, columns = np.nonzero((before != after).any(axis=-1))
    strip_rows = (rows > 165) & (rows < 235)
    layers = {int((column - 0.09 * WIDTH_PIXELS) / _CELL_WIDTH) for column in columns}
    assert strip_rows.all()
    assert layers == {5, 20}


def test_picture_hatches_what_exceeds_the_budget(scene):
    # The bar spans 600 MB; at 300 MB of budget the KV cache's pixels between 300 and 450 MB are crossed out.
    fits, over = (render_rgb(dataclasses.replace(scene, budget_bytes=budget)) for budget in (600_000_000, 300_000_000))
    vermilion = np.array([0xD5, 0x5E, 0x00])
    assert not (fits == vermilion).all(axis=-1).any()
    assert (over == vermilion).all(axis=-1).any()


def test_picture_depends_on_the_scene_alone(scene):
    assert np.array_equal(render_rgb(scene), render_rgb(scene))
    assert not np.array_equal(render_rgb(scene), render_rgb(dataclasses.replace(scene, reward=None)))


def test_picture_takes_a_fraction_of_a_second(scene):
    render_rgb(scene)  # reads the fonts
    fastest = np.inf
    for _ in range(3):
        start = time.perf_counter()
        render_rgb(dataclasses.replace(scene, mask=dense_mask(80)))
        fastest = min(fastest, time.perf_counter() - start)
    assert fastest < 0.5  # about 0.10 on an idle core; the rest is room for a busy machine


def test_rendering_never_loads_pyplot():
    code = "import sys, rap_env.envs.render_pixels; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_only_pictures_need_matplotlib():
    code = """
import sys
import gymnasium
from rap_env.importance.source import ImportanceSource
from rap_env.llm.loading import build_tiny_llm
from rap_env.problem import PruningProblem
from tests.conftest import CountingEvaluator

llm = build_tiny_llm()
importance = ImportanceSource([component.name for component in llm.shape.components])
parts = {"problem": PruningProblem(llm, CountingEvaluator()), "importance": importance}
for mode in ("ansi", "rgb_array"):
    env = gymnasium.make("rap/Pruning-v0", render_mode=mode, **parts)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    env.render()
    assert ("matplotlib" in sys.modules) == (mode == "rgb_array"), mode
"""
    subprocess.run([sys.executable, "-c", code], check=True)
