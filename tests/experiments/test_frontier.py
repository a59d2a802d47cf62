"""The frontier: what is chosen at a budget, what is refused, and what the picture shows."""

import pytest

from experiments.report import __main__ as command
from experiments.report import frontier
from experiments.report.tables import table_lines
from tests.experiments.comparison_records import record, row

WORKLOADS = ((1, 512), (16, 2048))


Points = list[tuple[float, float]]  # share of the bytes and loss, the whole model's first


def made(granularity: str, points: Points, weights: str = "full", compensation: str = "none") -> dict:
    """A record whose masks have the same points at both workloads."""

    def rows(of_points: Points) -> list[dict]:
        return [
            row(workload, 0.5, loss, []) | {"footprint": {"peak_bytes": int(share * 1000)}}
            for workload in WORKLOADS
            for share, loss in of_points
        ]

    found = record("evopress", 0, rows(points[1:]))
    found["results"]["references"]["dense"] = rows(points[:1])
    found["config"]["model"] |= {"granularity": granularity, "weights": weights, "kv_cache": "full"}
    found["config"]["widths"] = {"compensation": compensation}
    return found


@pytest.fixture
def records() -> list[dict]:
    return [
        made("group", [(0.5, 2.2), (0.3, 3.0)], weights="int4"),
        made("block", [(1.0, 2.0), (0.75, 3.0), (0.5, 4.0)]),
        made("group", [(1.0, 2.0), (0.7, 2.4), (0.6, 2.8), (0.55, 2.7)], compensation="ridge"),
    ]


def test_the_best_mask_that_fits_is_chosen_by_its_search_score(records):
    # A loss on the report half is a quarter more than on the search half, and the whole model's there is 2.5.
    budgets = {f"{budget:.0%}": place for place, budget in enumerate(frontier.BUDGETS, 1)}
    table = frontier.frontier_table(records)
    assert table.columns[1:] == list(budgets)
    rows = {cells[0]: cells for cells in table.rows}
    assert list(rows) == ["INT4 alone", "whole sites", "parts, INT4", "parts, ridge"]
    assert [rows["INT4 alone"][budgets[each]] for each in ("90%", "50%", "40%")] == ["**0.250**", "**0.250**", "-"]
    assert rows["whole sites"][budgets["90%"]] == rows["whole sites"][budgets["75%"]] == "1.250"
    assert rows["parts, ridge"][budgets["60%"]] == "0.875"  # of the smaller mask, which is better
    assert rows["parts, INT4"][budgets["60%"]] == rows["parts, INT4"][budgets["50%"]] == "**0.250**"
    assert rows["parts, INT4"][budgets["30%"]] == "**1.250**" and rows["parts, ridge"][budgets["50%"]] == "-"


def test_records_that_say_the_same_or_miss_the_reference_are_refused(records):
    with pytest.raises(ValueError, match="two of one"):
        frontier.frontier_table([*records, records[0]])
    with pytest.raises(ValueError, match="expected a record of 'whole sites' among them; got parts, INT4"):
        frontier.frontier_table([records[0], records[2]])
    records[0]["results"]["rows"] = records[0]["results"]["rows"][:1]
    records[0]["results"]["references"]["dense"] = records[0]["results"]["references"]["dense"][:1]
    with pytest.raises(ValueError, match="same workloads"):
        frontier.frontier_table(records)


def test_the_picture_has_a_panel_for_each_workload(records, tmp_path, capsys, monkeypatch):
    figure = frontier.frontier_figure(records).figure
    assert len(figure.data) == 3 * len(WORKLOADS)
    assert {trace.name for trace in figure.data if trace.showlegend} == {"whole sites", "parts, INT4", "parts, ridge"}
    assert table_lines("frontier", {"frontier": records})[3].startswith("| whole sites |")
    monkeypatch.setattr(command, "read_records", lambda _path: records)
    command.main(["--frontier", str(tmp_path), "-o", str(tmp_path / "page.html")])
    assert "| whole sites | " in capsys.readouterr().out
    assert 'id="figure-frontier"' in (tmp_path / "page.html").read_text()
