"""Rows are of one family where what they report on is the same, whatever each seed searches on."""

import copy

from experiments.leaderboard.rows import family_of

TEXT = {"search_paths": ["/here/valid.txt"], "report_paths": ["/here/test.txt"], "report_windows": [16, 256]}
MIXED = {
    "model": {"name": "tiny"},
    "widths": {"ordering": "wanda"},
    "calibration": {"corpus": {"paths": ["/here/valid.txt"]}},
    "evaluation": {"parts": {"text": TEXT | {"seed": 0, "search_windows": [3, 256]}, "recall": {"limit": 4}}},
    "workload": {"sampler": {"budget_ratio": [0.5, 0.95]}},
}


def other(**of_text) -> dict:
    config = copy.deepcopy(MIXED)
    config["evaluation"]["parts"]["text"] |= of_text
    return config


def test_seeds_that_draw_other_search_text_for_a_part_of_a_mixture_are_of_one_family():
    elsewhere = other(seed=1, search_windows=[8, 256], report_paths=["/there/test.txt"])
    assert family_of(elsewhere, []) == family_of(MIXED, [])


def test_parts_that_report_on_other_windows_are_of_another_family():
    assert family_of(other(report_windows=[8, 256]), []) != family_of(MIXED, [])
