"""Tables of what serving costs: read, written, refused, and measured on a tiny model."""

import dataclasses
import json
import math

import numpy as np
import pytest

from rap_env.errors import InvalidConfig, InvalidTable
from rap_env.llm.live import LiveModel
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from rap_env.serving.tables import Level, ServingTable, embedded_table
from rap_env.serving.timing import Ladder, StepCase, _design, _fit, measure_table
from tests.serving.cases import LEVELS, TABLE


def test_a_table_is_read_as_it_was_written_and_never_written_over(tmp_path):
    path = TABLE.save(tmp_path / "table.json")
    assert ServingTable.load(path) == TABLE
    with pytest.raises(FileExistsError):
        TABLE.save(path)


def test_seconds_and_bytes_are_the_sums_that_the_docstring_says():
    assert TABLE.step_seconds(1, 40, 3, 200) == pytest.approx(0.5 + 0.4 + 0.3 + 0.2)
    assert TABLE.needed_bytes(0, 7) == 100 + 50 + 1000 + 70
    assert TABLE.switching_seconds(0, 0) == 0.0
    assert TABLE.switching_seconds(0, 1) == pytest.approx(0.25 + 0.5)
    assert TABLE.switching_seconds(1, 0) == pytest.approx(0.25 + 1.0)
    assert LEVELS[1].quality == pytest.approx(0.5)


def test_the_table_that_ships_is_a_ladder_of_eight_and_says_how_it_was_measured():
    table = embedded_table()
    assert len(table.levels) == 8 and table.levels[0].loss_over_dense == 0.0
    assert "stand-ins" in table.measured["losses"]
    assert {"model", "threads", "relative_errors", "losses"} <= set(table.measured)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"levels": LEVELS[:1]}, "levels: expected at least two; got 1"),
        ({"levels": (LEVELS[0], LEVELS[0])}, "expected a name of its own"),
        ({"levels": LEVELS[::-1]}, "expected fewer bytes"),
        ({"fixed_bytes": -1}, "fixed_bytes: expected a whole number of at least 0; got -1"),
        ({"fixed_bytes": 1.5}, "fixed_bytes: expected a whole number"),
        ({"activation_bytes": True}, "activation_bytes: expected a whole number"),
        ({"byte_down_seconds": math.nan}, "byte_down_seconds: expected a finite number of at least 0; got nan"),
        ({"byte_up_seconds": "fast"}, "byte_up_seconds: expected a finite number"),
        ({"max_batch": 0}, "expected 1 <= max_batch <= read_tokens; got 0 and 100"),
        ({"read_tokens": 3}, "expected 1 <= max_batch <= read_tokens; got 4 and 3"),
    ],
)
def test_tables_that_can_not_be_are_refused(changes, says):
    with pytest.raises(InvalidTable, match=says):
        dataclasses.replace(TABLE, **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base_seconds": 0.0}, "level 'half': base_seconds: expected more than 0"),
        ({"base_seconds": math.inf}, "level 'half': base_seconds: expected a finite number"),
        ({"weight_bytes": 1000}, "level 'half': expected fewer bytes than 'all' before it"),
        ({"kv_bytes_per_token": 11}, "level 'half': expected fewer bytes than 'all' before it"),
        ({"loss_over_dense": -0.1}, "loss_over_dense: expected a finite number of at least 0"),
        ({"kept_share": 1.0}, "expected a smaller share and no less loss"),
        ({"name": ""}, "name: expected a name; got ''"),
    ],
)
def test_levels_that_are_no_ladder_are_refused(changes, says):
    with pytest.raises(InvalidTable, match=says):
        dataclasses.replace(TABLE, levels=(LEVELS[0], dataclasses.replace(LEVELS[1], **changes)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "Expecting property name"),
        ("[1]", "the table: expected a JSON object; got list"),
        ("{}", "the table: missing: activation_bytes, "),
        ("levels=5", "levels: expected a list; got int"),
        ("levels=[7]", "a level: expected a JSON object; got int"),
        ('levels=[{"name": "x", "colour": 1}]', "a level: missing: base_seconds, .*; unknown: colour"),
    ],
)
def test_files_that_are_no_tables_are_refused_by_their_name(tmp_path, text, says):
    path = tmp_path / "hostile.json"
    if text.startswith("levels="):
        text = json.dumps(dataclasses.asdict(TABLE) | {"levels": json.loads(text.removeprefix("levels="))})
    path.write_text(text)
    with pytest.raises(InvalidTable, match=rf"hostile\.json: not a serving table: {says}"):
        ServingTable.load(path)


def test_the_fit_finds_the_seconds_that_steps_were_made_of():
    rows = [
        (level, StepCase(n, cached, prompt))
        for level in (0, 1)
        for n in (1, 4)
        for cached in (8, 64)
        for prompt in (0, 9)
    ]
    truth = np.array([0.5, 0.02, 0.1, 0.3, 0.01, 0.05, 0.001])
    design = _design(rows, 2)
    assert design[1].tolist() == [1, 9, 1, 0, 0, 0, (8 + 1) + 9]
    np.testing.assert_allclose(_fit(design, design @ truth), truth, rtol=1e-6)


def test_a_tiny_model_is_measured_and_gets_its_mask_back():
    llm = build_tiny_llm(n_layers=2)
    masks = [PruningMask.all_kept(llm.shape)]
    masks.append(masks[0].drop(llm.shape.components[0].name))
    done = []
    table = measure_table(
        LiveModel(llm),
        Ladder(tuple(masks), ("dense", "less"), (0.0, 0.5), "made up"),
        max_batch=8,
        read_tokens=32,
        repeats=2,
        progress=lambda n, of: done.append((n, of)),
    )
    assert llm.mask == masks[0] and done == [(1, 2), (2, 2)]
    assert [level.weight_bytes for level in table.levels] == [mask.weight_bytes for mask in masks]
    assert table.measured["losses"] == "made up"
    assert table.fixed_bytes == llm.shape.fixed_bytes
    assert all(0.0 < table.step_seconds(level, 16, 2, 100) < 1.0 for level in (0, 1))
    errors = table.measured["relative_errors"]
    assert errors["held_out_steps"]["cases"] == 10 and errors["fitted_steps"]["cases"] == 20


def test_a_ladder_without_a_loss_for_each_mask_and_steps_without_room_are_refused():
    llm = build_tiny_llm(n_layers=2)
    dense = PruningMask.all_kept(llm.shape)
    with pytest.raises(InvalidConfig, match="expected a name and a loss for each of the 1 masks; got 1 and 2"):
        Ladder((dense,), ("dense",), (0.0, 1.0), "made up")
    with pytest.raises(InvalidConfig, match="expected room for 4 prompt tokens beside 4 sequences"):
        measure_table(LiveModel(llm), Ladder((dense,), ("dense",), (0.0,), "made up"), max_batch=4, read_tokens=6)


def test_levels_need_no_order_of_speed():
    slower = Level("half", 0.5, 500, 10, 0.5, 2.0, 0.02, 0.2, 0.3)
    assert dataclasses.replace(TABLE, levels=(LEVELS[0], slower)).step_seconds(1, 0, 0, 0) == 2.0
