"""The tables of kinds of context, with numbers worked out by hand."""

import math

import numpy as np
import pytest

from experiments.report.contexts import context_table, excess, order_table, recall_table


def of_mask(**columns):
    return {name.replace("_", " "): value for name, value in columns.items()}


def record() -> dict:
    measured = {
        "prose": [of_mask(prose=[3.0, 3.2], code=[2.0, 2.0]), of_mask(prose=[3.0, 3.0], code=[2.0, 2.0])],
        "code": [of_mask(prose=[4.0, 4.0], code=[1.0, 1.0]), of_mask(prose=[4.0, 4.2], code=[1.0, 1.0])],
    }
    costs = {
        "prose": [{"heads": {"a": 1.0, "b": 2.0, "c": 3.0}, "halves": {}}] * 2,
        "code": [{"heads": {"a": 3.0, "b": 2.0, "c": 1.0}, "halves": {}}] * 2,
    }
    dense = {"prose": [2.5, 2.5], "code": [0.5, 0.5]}
    return {"results": {"measured": {"2 heads": measured}, "costs": costs, "dense": dense}}


def test_an_excess_is_paired_over_windows_and_its_error_holds_what_draws_differ_by():
    losses = {"own": np.array([[1.0, 2.0], [1.2, 2.2]]), "other": np.array([[1.5, 2.7], [1.5, 2.7]])}
    value, error = excess(losses, "other", "own")
    assert value == pytest.approx(0.5)  # windows: 1.5 - 1.1 and 2.7 - 2.1
    of_draws = np.mean([0.02, 0.0])  # variances of (1.5, 1.7) and of (2.1, 2.1)
    assert error == pytest.approx(math.sqrt(0.02 / 2 + of_draws))


def test_the_matrix_has_own_masks_with_their_draws_and_marks_what_is_beyond_noise():
    rows = context_table(record()).rows
    assert rows[0][:3] == ["2 heads", "prose", "0.550, draws 0.100 apart"]
    assert rows[0][3] == "1.500 (**+1.000 ± 0.000**)" and rows[1][3] == "0.500, draws 0.000 apart"
    assert rows[1][2].startswith("1.550 (**+1.000 ± 0.0")


def test_orders_are_compared_between_draws_and_between_kinds():
    assert order_table(record()).rows == [
        ["prose", "another draw", "1.00"],
        ["prose", "code", "-1.00"],
        ["code", "another draw", "1.00"],
    ]


def test_recall_shows_the_dense_models_interval_and_what_was_not_measured():
    def metrics(acc):
        return {"acc": acc, "smooth_acc": acc / 2, "items": 24}

    measured = {"30 heads": {"prose 64": [{"recall 256": metrics(0.5)}, {"recall 256": metrics(0.25)}]}}
    dense = {"recall 1024": metrics(0.0), "recall 256": metrics(0.5)}
    table = recall_table({"results": {"measured": measured, "dense": dense}})
    assert table.columns[2:] == ["recall 256", "recall 1024"]
    assert table.rows[0][2] == "0.50 (smooth 0.25) [0.31, 0.69]" and table.rows[0][3].endswith("[0.00, 0.14]")
    assert table.rows[1][2:] == ["0.50 (smooth 0.25), 0.25 (smooth 0.12)", "-"]
