"""The tables of kinds of context, with numbers worked out by hand."""

import math

import numpy as np
import pytest

from experiments.report.contexts import context_table, excess, mean_excess, mean_table, order_table, recall_table


def of_mask(**columns):
    return {name.replace("_", " "): value for name, value in columns.items()}


def record() -> dict:
    measured = {
        "prose 64": [
            of_mask(prose_64=[3.0, 3.2], code_64=[2.0, 2.0]),
            of_mask(prose_64=[3.0, 3.0], code_64=[2.0, 2.0]),
        ],
        "code 64": [of_mask(prose_64=[4.0, 4.0], code_64=[1.0, 1.0]), of_mask(prose_64=[4.0, 4.2], code_64=[1.0, 1.0])],
    }
    costs = {
        "prose 64": [{"heads": {"a": 1.0, "b": 2.0, "c": 3.0}, "halves": {}}] * 2,
        "code 64": [{"heads": {"a": 3.0, "b": 2.0, "c": 1.0}, "halves": {}}] * 2,
    }
    dense = {"prose 64": [2.5, 2.5], "code 64": [0.5, 0.5]}
    return {"results": {"measured": {"2 heads": measured}, "costs": costs, "dense": dense}}


def test_an_excess_is_paired_over_windows_and_its_error_holds_what_draws_differ_by():
    losses = {"own": np.array([[1.0, 2.0], [1.2, 2.2]]), "other": np.array([[1.5, 2.7], [1.5, 2.7]])}
    value, error = excess(losses, "other", "own")
    assert value == pytest.approx(0.5)  # windows: 1.5 - 1.1 and 2.7 - 2.1
    of_draws = np.mean([0.02, 0.0])  # variances of (1.5, 1.7) and of (2.1, 2.1)
    assert error == pytest.approx(math.sqrt(0.02 / 2 + of_draws))


def test_the_matrix_has_own_masks_with_their_draws_and_marks_what_is_beyond_noise():
    table = context_table(record())
    assert table.columns == ["dropped", "found for", "in code 64", "in prose 64"]
    code, prose = table.rows
    assert code[:3] == ["2 heads", "code 64", "0.500, draws 0.000 apart"]
    assert prose[1:] == ["prose 64", "1.500 (**+1.000 ± 0.000**)", "0.550, draws 0.100 apart"]
    assert code[3].startswith("1.550 (**+1.000 ± 0.0")


def test_the_mean_excess_holds_what_masks_of_draws_have_in_common_in_all_columns():
    def cell(first, second):
        return np.array([[first], [second]]) + np.array([0.0, 0.4])  # two windows

    losses = {
        "a 64": {"a 64": cell(1.0, 1.2), "b 64": cell(2.0, 2.2)},  # its second mask is worse by 0.2 everywhere
        "b 64": {"a 64": cell(1.5, 1.5), "b 64": cell(1.5, 1.5)},
    }
    value, error = mean_excess(losses)
    assert value == pytest.approx((1.5 - 1.1 + 2.1 - 1.5) / 2)
    assert error == pytest.approx(0.0, abs=1e-9), "windows are paired, and so are the columns of one mask"
    losses["a 64"]["b 64"] = cell(2.0, 2.4)  # and by 0.4 in the other column: halves of -0.2 and 0.4 differ by 0.1
    assert mean_excess(losses)[1] == pytest.approx(math.sqrt(0.1**2 / 4))


def test_means_are_of_all_kinds():
    assert mean_table(record()).rows == [["2 heads", "0.525", "+1.000 ± 0.035", "0.050"]]


def test_orders_are_compared_between_draws_and_between_kinds():
    assert order_table(record()).rows == [
        ["code 64", "another draw", "1.00"],
        ["code 64", "prose 64", "-1.00"],
        ["prose 64", "another draw", "1.00"],
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
