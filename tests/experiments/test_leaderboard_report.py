"""The ranking and the curves of a leaderboard, computed by hand on rows that nobody ran."""

import json

import pytest

from experiments.report import __main__ as command
from experiments.report.leaderboard import is_leaderboard, leaderboard_figure, leaderboard_table
from experiments.report.tables import table_lines
from tests.experiments.test_amortisation import SAMPLER

CONTEXTS = ((1, 512, 0.9), (16, 2048, 0.7), (1, 512, 0.5))  # the last one lies outside


def made(agent: str, budget: int, *losses: tuple[float, float, float], dense: float = 2.0) -> dict:
    """A row; a tuple of losses for each seed."""
    contexts = [
        [
            {"batch_size": n, "prompt_tokens": length, "budget_ratio": ratio, "loss": loss}
            for (n, length, ratio), loss in zip(CONTEXTS, of_seed, strict=True)
        ]
        for of_seed in losses
    ]
    return {
        "config": {"workload": {"sampler": SAMPLER}},
        "provenance": {"git": {"commit": "0123456789", "dirty": False}},
        "results": {
            "agent": agent,
            "token_budget": budget,
            "tuned_on": "text | nothing",
            "tuning_tokens": 5,
            "tokens": [budget - 1] * len(losses),
            "dense_loss": [dense] * len(losses),
            "contexts": contexts,
        },
    }


@pytest.fixture
def rows() -> list[dict]:
    return [
        made("greedy", 100, (2.5, 3.0, 9.0), (2.5, 3.0, 9.0)),
        made("table", 400, (2.25, 2.5, 3.0), (2.5, 3.0, 4.0)),
        made("table", 200, (2.5, 3.5, 5.0), (2.75, 3.5, 5.0)),
    ]


def test_the_least_held_out_loss_comes_first_with_its_range_over_seeds(rows):
    assert leaderboard_table(rows).rows == [
        ["1", "table", "2", "399", "0.562 [0.375, 0.750]", "1.500 [1.000, 2.000]", "text / nothing", "5"],
        ["2", "greedy", "1 (deterministic)", "99", "0.750", "7.000", "text / nothing", "5"],
        ["3", "table", "2", "199", "1.062 [1.000, 1.125]", "3.000", "text / nothing", "5"],
    ]


def test_five_seeds_have_an_interval_within_their_range(rows):
    five = made("five", 100, *((2.0 + 0.1 * seed, 2.0 + 0.1 * seed, 3.0) for seed in range(5)))
    assert leaderboard_table([five]).rows[0][4].startswith("0.200 [0.0")


def test_a_curve_joins_an_agents_rows_in_the_order_of_tokens(rows):
    traces = {trace.name: trace for trace in leaderboard_figure(rows).figure.data}
    assert list(traces["table"].x) == [199.0, 399.0] and list(traces["table"].y) == [1.0625, 0.5625]
    assert list(traces["greedy"].x) == [99.0]


def test_the_command_reports_a_leaderboard_with_its_page(rows, tmp_path, capsys):
    path = tmp_path / "leaderboard.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command.main([str(path), "-o", str(tmp_path / "page.html")])
    said = capsys.readouterr().out
    assert "| 1 | table | 2 | 399 |" in said and "In brackets the range over seeds" in said
    assert "figure-leaderboard" in (tmp_path / "page.html").read_text()


def test_runs_are_no_leaderboard(rows):
    assert is_leaderboard(rows) and not is_leaderboard([{"results": {"agent": "table"}}]) and not is_leaderboard([])


def test_the_documentation_knows_the_table(rows):
    assert table_lines("leaderboard", {"leaderboard": rows})[2].startswith("| 1 | table |")
