"""Tables say what the records hold, and where these come from."""

import copy

import pytest

from experiments.report import kept_picture, run_table
from experiments.report.comparison import Comparison
from experiments.report.metrics import loss_over_dense
from experiments.report.tables import metrics_table, spending_table, table_lines
from rap_env.errors import UnknownName
from tests.experiments.comparison_records import WORKLOADS, record, records, row

WORK = (1, 512)


@pytest.fixture
def comparison() -> Comparison:
    return Comparison(records())


def cells_of(table, name: str) -> dict[str, str]:
    (cells,) = [line for line in table.rows if line[0] == name]
    return dict(zip(table.columns, cells, strict=True))


def test_metrics_have_the_best_agent_first_and_count_violations(comparison):
    table = metrics_table(comparison)
    assert [line[0] for line in table.rows] == ["learned", "greedy", "random", "dense"]
    dense = cells_of(table, "dense")
    assert dense["violations"] == "4 of 4" and dense["held-out violations"] == "10 of 10"
    assert dense["IQM regret (text)"] == "-"
    greedy = cells_of(table, "greedy")
    assert greedy["IQM log-perplexity over dense (text)"] == "1.562"  # 1.25 * (4 - 0.75) - 2.5
    assert greedy["tokens of 2000"] == "600"
    random = cells_of(table, "random")["mean log-perplexity over dense (text)"]
    assert random == "5.625 [5.000, 6.250]"  # 1.25 * 6 - 2.5 and 1.25 * 7 - 2.5
    assert loss_over_dense(comparison, "random", "text").mean() == 5.625


def test_measured_seconds_stand_beside_those_of_this_run(comparison):
    learned = cells_of(metrics_table(comparison), "learned")
    assert (learned["search s"], learned["s of this run"]) == ("50.0", "1.0")
    assert not any("GB" in column for column in metrics_table(comparison).columns)


def test_spending_says_what_tokens_bought(comparison):
    table = spending_table(comparison)
    assert table.columns == ["agent", "250", "500", "1000", "2000"]
    assert table.rows == [
        ["greedy", "-", "-", "1.250", "1.250"],
        ["learned", "-", "2.000", "1.500", "1.500"],
        ["random", *["4.500"] * 4],
    ]  # dense violates everything


def test_compact_tables_of_several_comparisons_name_them():
    lines = table_lines("compact", {"toys": records()})
    assert lines[0] == "| agent | seeds | mean loss over dense, search half | report half | tokens |"
    assert lines[2].startswith("| learned | 2 | 0.800 [0.750, 0.850] | 1.000 [0.938, 1.062] | 2000 |")
    both = table_lines("compact", {"toys": records(), "others": records()[1:2]})
    assert "| others | greedy | 1 | 1.250 | 1.562 | 600 |" in both


def test_perplexities_stand_with_what_was_searched_by():
    # the report loss is 1.25 * 3 and 1.25 * 3.2
    by_loss = [record("archive", seed, [row(WORK, 0.9, 3.0 + 0.2 * seed, [])], 20) for seed in range(2)]
    by_divergence = copy.deepcopy(by_loss[:1])
    by_divergence[0]["results"]["rows"][0]["search"] = {"score": -0.5, "tasks": {"text": {"divergence": 0.5}}}
    greedy = record("greedy_gsi", 0, [row(WORK, 0.9, 4.0, [])], tokens=300)
    lines = table_lines("perplexity", {"loss": [*by_loss, greedy], "divergence": [*by_divergence, greedy]})
    assert lines == [
        "| agent | searched by | perplexity of each seed | mean |",
        "| --- | --- | --- | --- |",
        "| archive | divergence | 42.5 | 42.5 |",
        "| archive | loss | 42.5, 54.6 | 48.6 |",
        "| greedy_gsi |  | 148.4 | 148.4 |",
    ]


def test_perplexities_of_tasks_are_refused():
    made = copy.deepcopy(records())
    for one in made:
        one["results"]["evaluators"] = ["tasks", "text"]
    with pytest.raises(ValueError, match="expected an evaluator by text for a table of perplexities; got 'tasks'"):
        table_lines("perplexity", {"toys": made})


def test_closing_table_of_a_run_compares_its_policy_with_the_references():
    table = run_table(records()[2])
    assert table.columns == ["policy", "budget GB", "footprint GB", "minus the loss", "reward", "violations"]
    # budgets 0.9, 0.6, 14.4 and 9.6 GB; losses 1.25 * 2.6 and 1.25 * 2.9 twice
    assert table.rows[0] == ["learned", "6.375", "0.500", "-3.438", "-3.438", "0 of 4"]
    assert table.rows[1] == ["dense", "7.650", "0.500", "-2.500", "-3.500", "2 of 2"]


def test_closing_table_of_tasks_has_both_accuracies():
    made = copy.deepcopy(records()[0])
    made["results"]["evaluators"] = ["tasks"]
    dense = cells_of(run_table(made), "dense")
    assert (dense["accuracy"], dense["smooth accuracy"]) == ("0.800", "0.400")


def test_closing_table_has_no_reward_where_the_report_half_lacks_its_terms():
    made = copy.deepcopy(records()[2])
    for of_scenario in made["results"]["rows"]:
        of_scenario["reports"]["text"]["reward"] = None
    assert run_table(made).columns == ["policy", "budget GB", "footprint GB", "minus the loss", "violations"]


def test_closing_table_over_seeds_has_their_range_and_each_reference_once():
    lines = table_lines("run", {"toys": [made for made in records() if made["results"]["agent"] == "learned"]})
    assert lines[0].startswith("| policy | seeds | budget GB |")
    assert lines[2].startswith("| learned | 2 | 6.375 | 0.500 | -3.500 [-3.562, -3.438] |")
    assert lines[3].startswith("| dense | 1 (deterministic) | 7.650 | 0.500 | -2.500 | ")
    assert "In brackets the range over seeds, from 5 seeds on a 95% bootstrap interval." in lines


def test_tables_of_one_clean_commit_and_machine_have_no_note_on_them():
    assert [line for line in table_lines("spending", {"toys": records()}) if not line.startswith("|")] == []


def test_tables_over_several_commits_say_so():
    made = records()
    made[0]["provenance"]["git"] = {"commit": "fedcba9876543210", "dirty": True}
    made[1]["provenance"]["git"] = None
    (note,) = [line for line in table_lines("spending", {"toys": made}) if line and not line.startswith("|")]
    assert note == (
        "The records are of these commits: 0123456 (4), fedcba9 with uncommitted changes (1), no known commit (1)."
    )


def test_tables_of_one_changed_checkout_say_so():
    made = records()[1:2]
    made[0]["provenance"]["git"]["dirty"] = True
    assert table_lines("spending", {"toys": made})[-1].endswith("0123456 with uncommitted changes (1).")


def test_tables_over_machines_with_other_arithmetic_say_so():
    made = records()
    made[0]["provenance"]["numeric_platform"] = {"device": "cuda", "name": "toy GPU"}
    made[1]["provenance"]["hardware"] = {"cpu": "another processor with equal arithmetic"}
    (note,) = [line for line in table_lines("spending", {"toys": made}) if line and not line.startswith("|")]
    assert note.startswith("The records are of 2 machines, whose scores may differ slightly: ") and "toy GPU" in note


def test_an_unknown_kind_of_table_is_refused():
    with pytest.raises(UnknownName, match=r"unknown kind of table 'metric'.*metrics"):
        table_lines("metric", {"toys": records()})


def test_picture_of_what_a_run_keeps_shows_dropped_components_dark():
    dropped = ["layer0.attention", "layer2.attention"]
    made = record("ppo", 0, [row(workload, 0.6, 3.0, dropped) for workload in WORKLOADS])
    everything = record("ppo", 0, [row(workload, 0.6, 3.0, []) for workload in WORKLOADS])
    picture, light = kept_picture(made), kept_picture(everything)
    assert picture.shape == light.shape and picture.dtype == "uint8" and picture.shape[2] == 3
    left, right = picture.shape[1] // 2, picture.shape[1] // 2
    assert (picture[:, :left] != light[:, :left]).any(), "attentions stand to the left"
    assert (picture[:, right:] == light[:, right:]).all(), "no MLP was dropped"


def test_picture_takes_parts_of_sites():
    made = record("ppo", 0, [row(WORK, 0.6, 3.0, ["layer0.mlp.1"])])
    made["results"]["components"] = ["layer0.attention.0", "layer0.attention.1", "layer0.mlp.0", "layer0.mlp.1"]
    kept = copy.deepcopy(made)
    kept["results"]["rows"][0]["dropped"] = []
    assert (kept_picture(made) != kept_picture(kept)).any()


def compensated(compensation: str, n_samples: int, loss: float, ridge: float | None = None) -> dict:
    made = record("uniform_mlp", 0, [row(WORK, 0.8, 1.0, [])])
    made["config"]["widths"] = {"compensation": compensation, "ridge": ridge, "n_samples": n_samples}
    (only,) = made["results"]["rows"]
    only["budget_ratio"], only["reports"]["text"]["score"] = 0.75, -loss
    return made


def test_compensations_have_a_row_each_and_a_column_for_each_budget_and_text():
    made = [compensated("ridge", 8, 2.0, 0.1), compensated("ridge", 32, 1.0, 0.1), compensated("none", 8, 3.0)]
    lines = table_lines("compensation", {"compensation": [*made, compensated("ridge", 8, 1.5)]})
    first, second = "25.0% of all bytes, 8 windows", "25.0% of all bytes, 32 windows"
    assert lines[0] == f"| compensation | ridge | {first} | {second} |"
    assert lines[2:5] == ["| none |  | 20.09 | - |", "| ridge | 0.1 | 7.39 | 2.72 |", "| ridge | chosen | 4.48 | - |"]
    with pytest.raises(ValueError, match="there are two of"):
        table_lines("compensation", {"compensation": [made[0], made[0]]})
