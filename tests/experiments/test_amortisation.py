"""The report of a context family: held-out contexts apart from those outside, and what was spent for each of them."""

import json

import numpy as np
import pytest

from experiments.report import __main__ as command
from experiments.report import report_on
from experiments.report.amortisation import Amortisation, amortisation_figure, family_table, within_family
from experiments.report.comparison import draws_own_text, without_draws
from experiments.report.pairs import family_pairs_table, further_reports_table
from tests.experiments.comparison_records import record, row

SAMPLER = {"_target_": "sampler", "batch_size": [1, 16], "prompt_tokens": [128, 2048], "budget_ratio": [0.6, 0.95]}
CONTEXTS = (((1, 512), 0.9), ((16, 2048), 0.7), ((16, 4096), 0.7), ((1, 512), 0.5))  # the last two lie outside


def made(agent: str, seed: int, budget: int, losses: tuple[float, ...], spent: int, searched: int = 0) -> dict:
    """A record; on the report half losses are a quarter higher, the dense model has 2.5."""
    found = record(
        agent, seed, [row(*each, loss, []) for each, loss in zip(CONTEXTS, losses, strict=True)], tokens=spent
    )
    found["config"] |= {
        "token_budget": budget,
        "workload": {"sampler": SAMPLER, "search": {"first": searched}, "report": {"first": 64}},
    }
    found["results"]["search"] |= {"tokens_each": 10, "token_budget": budget}
    return found


@pytest.fixture
def records() -> list[dict]:
    return [
        made("greedy", 0, 100, (2.4, 2.8, 4.0, 5.0), 50),
        made("greedy", 0, 200, (2.4, 2.8, 4.0, 5.0), 50),
        *(made("table", seed, 100, (2.4 + 0.08 * seed, 2.8, 4.0, 6.0), 100) for seed in range(2)),
        *(made("table", seed, 200, (2.0 + 0.08 * seed, 2.4, 3.0, 4.0), 200) for seed in range(2)),
    ]


def test_contexts_within_the_samplers_ranges_are_held_out_and_others_outside(records):
    assert within_family(records[0]).tolist() == [True, True, False, False]


def test_losses_regret_and_evaluations_for_each_context_are_those_computed_by_hand(records):
    entries = {(entry.agent, entry.evaluations): entry for entry in Amortisation(records).entries}
    assert entries.keys() == {("greedy", 5.0), ("table", 10.0), ("table", 20.0)}, "equal spending stands there once"
    greedy, table = entries["greedy", 5.0], entries["table", 20.0]
    assert (greedy.for_each, table.for_each) == (2.5, 10.0), "of two held-out contexts"
    assert greedy.held_out == pytest.approx((1.25 * 2.6 - 2.5,) * 3)
    assert greedy.outside == pytest.approx((1.25 * 4.5 - 2.5,) * 3)
    # the best known losses are those of the larger budget's first seed: 2.0 and 2.4 on the search half
    assert greedy.regret == pytest.approx((1.25 * 0.4,) * 3)
    assert table.regret == pytest.approx((1.25 * 0.02, 0.0, 1.25 * 0.04))


def test_the_table_begins_with_the_least_held_out_loss(records):
    table = family_table(records)
    assert [cells[0] for cells in table.rows] == ["table", "greedy", "table"]
    assert table.rows[1][1:5] == ["1", "5", "2.5", "0.750"]


def test_the_figure_joins_an_agents_budgets(records):
    traces = {trace.name: trace for trace in amortisation_figure(records).figure.data}
    assert list(traces["table"].x) == [5.0, 10.0] and list(traces["greedy"].x) == [2.5]
    assert np.diff(traces["table"].y)[0] < 0


def test_a_search_on_the_reported_contexts_themselves_stands_beside_the_others(records):
    alone = made("greedy", 0, 100, (2.2, 2.6, 4.0, 5.0), 100, searched=64)
    assert "greedy on each context" in [entry.agent for entry in Amortisation([*records, alone]).entries]


def test_a_sweep_over_budgets_is_reported_as_a_family_with_a_page(records, tmp_path, capsys):
    path = tmp_path / "family.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    command.main([str(path), "-o", str(tmp_path / "page.html")])
    said = capsys.readouterr().out
    assert "held-out regret" in said and "figure-amortisation" in (tmp_path / "page.html").read_text()


def test_one_budget_is_a_comparison_with_the_familys_table_above(records):
    lines = report_on([one for one in records if one["config"]["token_budget"] == 100], None)
    assert "held-out regret" in lines[0] and any("IQM regret" in line for line in lines)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda one: one["config"].update(model={"name": "other"}), "expected records of one family"),
        (lambda one: one["config"]["workload"].update(sampler=SAMPLER | {"batch_size": [1, 2]}), "of one family"),
        (lambda one: one["results"]["rows"].pop(), "expected records of one family"),
    ],
)
def test_records_of_other_families_are_refused(records, spoil, message):
    other = made("other", 0, 400, (2.4, 2.8, 4.0, 5.0), 50)
    spoil(other)
    with pytest.raises(ValueError, match=message):
        Amortisation([*records, other])


def test_budgets_may_have_other_seeds_where_each_draws_search_text_of_its_own(records):
    for one in records:
        one["config"]["evaluation"] = {"name": "text", "seed": one["results"]["seed"]}
    fewer = [one for one in records if (one["config"]["token_budget"], one["results"]["seed"]) != (100, 0)]
    assert {entry.evaluations for entry in Amortisation(fewer).entries} == {5.0, 10.0, 20.0}


def test_how_much_calibration_text_is_read_is_the_agents_own_matter(records):
    for one in records:
        one["config"]["calibration"] = {"corpus": "searched", "seed": 0, "n_samples": 2}
    other = made("reader", 0, 400, (2.4, 2.8, 4.0, 5.0), 50)
    other["config"] |= {"name": "reader", "calibration": {"corpus": "searched", "seed": 0, "n_samples": 1024}}
    assert "reader" in [entry.agent for entry in Amortisation([*records, other]).entries]
    other["config"]["calibration"]["corpus"] = "another"
    with pytest.raises(ValueError, match="expected records of one family"):
        Amortisation([*records, other])


def test_agents_are_held_against_the_surrogate_of_the_same_seed_on_held_out_contexts():
    of_agents = [
        *(made("family_surrogate", seed, 100, (2.4 + 0.4 * seed, 2.8, 4.0, 6.0), 100) for seed in range(3)),
        *(made("learner", seed, 100, (2.4 + 0.32 * seed, 2.8, 1.0, 1.0), 100) for seed in (1, 2)),
        *(made("greedy", seed, 100, (2.56 + 0.4 * seed, 2.8 - 0.24 * seed, 4.0, 6.0), 100) for seed in range(3)),
        made("learner", 0, 200, (2.0, 2.0, 2.0, 2.0), 100),
    ]
    table = family_pairs_table(of_agents)
    assert [cells[:3] for cells in table.rows] == [["100", "learner", "2"], ["100", "greedy", "3"]]
    # greedy: half of 1.25 (0.16, 0.16 - 0.24, 0.16 - 0.48); the surrogate loses 1.25 (2.6, 2.8, 3.0) - 2.5
    assert table.rows[1][3:] == ["0.950", "-0.050 [-0.200, 0.100]", "2 of 3"]
    assert table.rows[0][3:] == ["0.933", "-0.075 [-0.100, -0.050]", "2 of 2"]
    with pytest.raises(ValueError, match="expected records of family_surrogate"):
        family_pairs_table(of_agents[3:])


def test_a_family_without_held_out_contexts_is_refused():
    outside = made("greedy", 0, 100, (2.4, 2.8, 4.0, 5.0), 50)
    outside["config"]["workload"]["sampler"] = SAMPLER | {"budget_ratio": [0.1, 0.2]}
    with pytest.raises(ValueError, match="a reported context within the ranges"):
        Amortisation([outside])


def test_further_reports_are_means_over_held_out_contexts_and_seeds():
    of_agents = [
        made(agent, seed, 100, (2.4 + 0.4 * seed, 2.8, 1.0, 9.0), 100) for agent in ("a", "b") for seed in (0, 1)
    ]
    for one in of_agents:
        results, better = one["results"], one["results"]["agent"] == "b"
        results["evaluators"] = [*results["evaluators"], "recall"]
        results["dense"]["recall"] = 0.75
        for place, each in enumerate(results["rows"]):
            score = 0.5 + 0.1 * results["seed"] if place < 2 else 0.0
            each["reports"]["recall"] = {"score": score + 0.1 * better, "tasks": {}}
            main = next(iter(each["reports"].values()))
            main["score"] += 0.5 * better
    table = further_reports_table(of_agents)
    assert table.columns[2:] == ["held-out loss over dense", "tasks (dense 0.800)", "recall (dense 0.750)"]
    assert [cells[0] for cells in table.rows] == ["b", "a"]
    assert table.rows[1][1] == "2" and table.rows[1][-1] == "0.550 [0.500, 0.600]"
    assert table.rows[0][-1] == "0.650 [0.600, 0.700]"


def test_a_part_of_an_evaluation_may_draw_its_text_by_the_runs_seed():
    evaluation = {"weights": {"text": 1.0}, "parts": {"text": {"seed": 3, "search_windows": [4, 256]}, "recall": {}}}
    record_of = {"config": {"evaluation": evaluation}, "results": {"seed": 3}}
    assert draws_own_text(record_of) and not draws_own_text(record_of | {"results": {"seed": 2}})
    expected = {"weights": {"text": 1.0}, "parts": {"text": {"search_windows": [4, 256]}, "recall": {}}}
    assert without_draws(evaluation) == expected
