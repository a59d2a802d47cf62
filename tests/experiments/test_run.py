"""A run ends with one record, is never done twice, goes on after a kill, and refuses bad input in one line."""

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from experiments.recipes.build import build
from experiments.report.amortisation import within_family
from rap_env.memory.workload import Workload
from rap_env.policies import load_policy

PROJECT = Path(__file__).parents[2]
SEARCH = "agent=random_search"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("smoke")


@pytest.fixture(scope="module")
def first(run_here, folder) -> dict:
    return run_here(folder / "first", SEARCH)


@pytest.fixture(scope="module")
def greedy(run_here, folder) -> dict:
    return run_here(folder / "greedy", "agent=greedy_gsi")


@pytest.fixture
def refusal(train_here, tmp_path):
    """What train.py says of something that it refuses."""

    def run(*overrides: str) -> str:
        said, code = train_here(tmp_path / "cache", "experiment=smoke", f"hydra.run.dir={tmp_path / 'run'}", *overrides)
        assert code not in (None, 0)
        return said + (code if isinstance(code, str) else "")

    return run


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_record_carries_config_and_provenance(first):
    assert first["config"]["model"]["name"] == "tiny" and first["config"]["seed"] == 0
    assert (first["results"]["agent"], first["results"]["seed"]) == ("random_search", 0)
    provenance = first["provenance"]
    assert provenance["versions"].keys() >= {"python", "torch", "transformers", "lm_eval", "stable_baselines3"}
    assert provenance["hardware"]["cores"] >= 1 and "git" in provenance
    for text in ("model_digest", "tokenizer_digest", "corpus_digest"):
        assert len(provenance[text]) == 64
    assert provenance["engine_version"] >= 2 and provenance["numeric_platform"]["device"] == "cpu"


def test_record_holds_a_row_for_every_scenario_and_reference(first):
    results = first["results"]
    assert [(row["batch_size"], row["prompt_tokens"]) for row in results["rows"]] == [(1, 512), (16, 1024)]
    assert results["evaluators"] == ["embedded"] and results["dense"].keys() == {"search", "embedded"}
    assert results["references"].keys() == {"dense", "random"}
    for name, rows in {"searched": results["rows"], **results["references"]}.items():
        for row in rows:
            assert row["budget_ratio"] == pytest.approx(0.8, abs=1e-3) and row["decision_milliseconds"] > 0
            assert row["violation"] == (row["footprint"]["peak_bytes"] > row["budget_bytes"]) == (name == "dense")
            report = row["reports"]["embedded"]
            assert all("_report" in task and metrics["items"] == 4 for task, metrics in report["tasks"].items())
            assert all("_search" in task for task in row["search"]["tasks"])
            assert report["score"] == report["reward_terms"]["accuracy"]
    dense = results["references"]["dense"][0]
    assert dense["dropped"] == [] and dense["search"]["score"] == results["dense"]["search"]
    assert results["held_out"] == {"decisions": 20, "violations": 0}


def test_objective_is_the_mean_reward_on_the_search_half(first):
    # no mask exceeds its budget, so that rewards are accuracies
    scores = [row["search"]["score"] for row in first["results"]["rows"]]
    assert first["results"]["objective"] == pytest.approx(sum(scores) / 2)


def test_report_half_without_choices_has_no_reward_by_them(run_here, folder):
    text = ("+evaluation@report.text=packaged_text", "report.text.report_windows=[1,32]")
    for row in run_here(folder / "text", "agent=random", "reward=smooth", *text)["results"]["rows"]:
        reports = row["reports"]
        assert reports["text"]["reward"] is None and reports["text"]["score"] < 0 < reports["embedded"]["reward"]


def test_search_costs_its_ranking_and_evaluations_in_tokens(first, greedy):
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        problem = build(compose("config", ["experiment=smoke"]), "embedded").search
    search, walk = first["results"]["search"], greedy["results"]["search"]
    assert search["token_budget"] == walk["token_budget"] == 60_000
    assert search["tokens"] == search["evaluations"] * problem.meter.tokens_each <= 60_000
    assert search["evaluations"] > 10 and search["ranking_tokens"] == 0
    assert walk["evaluations"] == 0 and walk["tokens"] == walk["ranking_tokens"] > 0
    assert search["measured_seconds"] > 0 and walk["measured_seconds"] > 0


def test_best_evaluated_mask_ends_the_anytime_curve(first, greedy):
    results = first["results"]
    means = [mean for _tokens, mean in results["anytime"]]
    assert means == sorted(means) and results["anytime"][-1][0] == results["search"]["tokens"]
    assert means[-1] == pytest.approx(sum(row["best_evaluated"] for row in results["rows"]) / 2)
    assert greedy["results"]["anytime"] == [] and greedy["results"]["rows"][0]["best_evaluated"] is None


def test_greedy_walk_is_a_reference_where_its_ranking_was_paid_for(greedy):
    results = greedy["results"]
    assert results["references"].keys() == {"dense", "random", "greedy_gsi"}
    for row, reference in zip(results["rows"], results["references"]["greedy_gsi"], strict=True):
        assert row["dropped"] == reference["dropped"]


def test_policy_beside_the_record_can_be_read(first, folder):
    policy = load_policy(folder / "first" / "policy")
    for row in first["results"]["rows"]:
        mask = policy.decide(Workload(row["batch_size"], row["prompt_tokens"]), row["budget_bytes"])
        assert [component.name for component in mask.dropped] == row["dropped"]


def test_table_on_the_screen_shows_the_agent_and_the_references(greedy, folder):
    for name in ("greedy_gsi", "dense", "random"):
        assert f" {name} " in greedy["said"]
    assert f"record: {folder / 'greedy' / 'record.json'}" in greedy["said"]


def test_same_config_in_another_folder_is_answered_by_the_store(first, run_here, folder):
    second = run_here(folder / "second", SEARCH)["results"]
    assert first["results"]["search"]["fresh_evaluations"] > second["search"]["fresh_evaluations"] == 0
    for same in ("objective", "dense", "anytime"):
        assert second[same] == first["results"][same]
    for same in ("tokens", "evaluations", "measured_seconds"):
        assert second["search"][same] == first["results"]["search"][same]
    for one, other in zip(first["results"]["rows"], second["rows"], strict=True):
        assert one | {"decision_milliseconds": 0} == other | {"decision_milliseconds": 0}


def test_finished_run_is_skipped_whatever_tracker_and_batches_in_flight(first, run_here, folder):
    before = files_in(folder / "first")
    again = run_here(folder / "first", SEARCH, "tracker=jsonl", "in_flight=2")
    assert again["results"] == first["results"] and again["said"] == ""
    assert files_in(folder / "first") == before


def test_record_of_another_config_is_refused_and_stays(first, train_here, folder):
    before = files_in(folder / "first")
    arguments = ("experiment=smoke", SEARCH, f"hydra.run.dir={folder / 'first'}", "seed=1", "decisions=21")
    said, code = train_here(folder / "cache", *arguments)
    assert "of a run with another decisions, seed, and records are written once" in code and said == ""
    assert files_in(folder / "first") == before


def test_generated_tokens_are_the_same_for_search_report_and_random_scenarios(run_here, folder, tiny_llm):
    rows = run_here(folder / "generated", "agent=random", "workload.generated_tokens=64")["results"]["rows"]
    assert [row["generated_tokens"] for row in rows] == [64, 64]
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        parts = build(compose("config", ["experiment=smoke", "workload.generated_tokens=64"]), "embedded")
    drawn = parts.sampler.sample(tiny_llm.shape, np.random.default_rng(0))
    scenarios = [drawn, *parts.searched, *parts.reported]
    assert {scenario.workload.generated_tokens for scenario in scenarios} == {64}


def test_contexts_may_be_a_family_of_which_some_are_held_out_and_some_lie_outside(run_here, folder):
    grid = ("~workload.search.workloads", "~workload.search.budget_ratios")
    numbers = ("workload.search.n=3", "workload.report.n=2", "workload.report.n_outside=1")
    record = run_here(folder / "family", "agent=random", "workload=family", *grid, *numbers)
    assert within_family(record).tolist() == [True, True, False]
    assert record["results"]["search"]["tokens_each"] > 0


def test_components_may_be_groups(run_here, folder):
    results = run_here(folder / "groups", "agent=greedy_gsi", "model.granularity=group")["results"]
    names, orders = zip(*(name.split("@") for name in results["components"]), strict=True)
    assert len(set(orders)) == 1, "all parts say which order they stand in"
    assert list(names[:4]) == [
        "layer0.attention.0",
        "layer0.attention.1",
        "layer0.mlp.0:64",
        "layer1.attention.0",
    ]
    assert len(results["components"]) == 12
    dropped = [name for row in results["rows"] for name in row["dropped"]]
    assert dropped and set(dropped) <= set(results["components"])


def test_jobs_of_a_sweep_share_what_neither_agent_nor_seed_changes():
    def parts(*overrides: str):
        with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
            return build(compose("config", ["experiment=smoke", *overrides]), "embedded")

    one, same = parts(), parts("seed=1", "agent=random", "reward=smooth", "workload.search.budget_ratios=[0.7]")
    assert same.search.llm is one.search.llm and same.search.evaluator is one.search.evaluator
    assert same.windows is one.windows
    assert (same.search.reward_weights, len(same.searched)) == ({"smooth_accuracy": 1.0, "overshoot": -5.0}, 2)
    other = parts("evaluation.limit=3")
    assert other.search.llm is one.search.llm and other.search.evaluator is not one.search.evaluator
    assert parts("model.dtype=bfloat16").search.llm is not one.search.llm


@pytest.mark.slow
def test_killed_run_goes_on_in_its_folder_and_repeats_no_finished_evaluation(tmp_path, run_here):
    run, long = tmp_path / "run", (SEARCH, "evaluation.limit=16", "token_budget=1_000_000", "tracker=jsonl")
    command = [sys.executable, str(PROJECT / "train.py"), "experiment=smoke", *long, f"hydra.run.dir={run}"]
    environment = os.environ | {"RAP_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while evaluations_in(tmp_path / "cache" / "results.db") < 10 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was over before it could be killed"
    kept = evaluations_in(tmp_path / "cache" / "results.db")
    (run / "metrics.jsonl").write_text("of the killed run\n")
    record = run_here(run, *long)
    search = record["results"]["search"]
    assert 0 < search["fresh_evaluations"] <= search["evaluations"] - 10 and kept >= 10
    assert "killed" not in (run / "metrics.jsonl").read_text()


def test_run_whose_policy_could_not_be_saved_has_no_record_and_goes_on(run_here, train_here, folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    unsaved, arguments = folder / "unsaved", ("agent=one_shot", "seed=11")
    monkeypatch.setattr("experiments.recipes.run.save_policy", full)
    said, code = train_here(folder / "cache", "experiment=smoke", f"hydra.run.dir={unsaved}", *arguments)
    assert code == 1 and "No space left on device" in said and not (unsaved / "record.json").exists()
    monkeypatch.undo()
    assert run_here(unsaved, *arguments)["results"]["search"]["tokens"] > 0
    assert load_policy(unsaved / "policy")


def evaluations_in(store: Path) -> int:
    if not store.is_file():
        return 0
    with sqlite3.connect(store.as_uri() + "?mode=ro", uri=True, timeout=30) as connection:
        (count,) = connection.execute("SELECT count(*) FROM evaluations").fetchone()
    connection.close()
    return count


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.report_tasks=[rap_search]", "would be searched on are reported on as well"),
        ("model.name=tinny", "unknown model or folder 'tinny'; did you mean tiny?"),
        ("workload.sampler.budget_ratio=[0.01,0.9]", "no pruning mask fits"),
        ("workload.report.budget_ratios=[0.01]", "no pruning mask fits"),
        ("workload.report.budget_ratios=[]", "workload.report.budget_ratios: expected at least one; got none"),
        ("workload.search.workloads=[]", "workload.search.workloads: expected at least one; got none"),
        ("workload.sampler.batch_size=[8,4]", "batch_size: expected 0 < smallest <= largest; got 8 and 4"),
        ("seed=-1", "seed: expected a whole number of at least 0; got -1"),
        ("seed=abc", "seed: expected a whole number of at least 0; got 'abc'"),
        ("seed=1.5", "seed: expected a whole number of at least 0; got 1.5"),
        ("token_budget=null", "token_budget: expected a whole number of at least 0; got None"),
        ("in_flight=0", "in_flight: expected a whole number of at least 1; got 0"),
        ("calibration=local", "calibration.corpus.paths: expected a value; got none"),
        ("calibration.tokens_per_sample=100_000", "windows of 100,000 tokens are beyond the model's context"),
        ("workload=family", "family_contexts takes no budget_ratios, workloads; it takes shape, sampler, n"),
        ("evaluation=packaged_text", "packaged_text_halves takes no limit; it takes llm"),  # the experiment's limit
    ],
)
def test_bad_input_is_refused_in_one_line_before_any_work(override, message, refusal, tmp_path):
    said = refusal("agent=random", override)
    assert said.startswith("error: ") and message in said
    assert len(said.splitlines()) == 1
    assert not files_in(tmp_path).keys() - {"cache/results.db"}


def test_reward_by_choices_is_refused_for_a_text_before_any_work(refusal, tmp_path):
    said = refusal("agent=greedy_gsi", "reward=smooth", "evaluation=packaged_text", "~evaluation.limit")
    assert said.startswith("error: reward: smooth_accuracy is the mean probability of right choices, and ")
    assert said.endswith(" has none; expected reward=loss for a text, or reward=accuracy")
    assert not files_in(tmp_path).keys() - {"cache/results.db"}


def test_budget_that_does_not_pay_for_the_ranking_is_refused_in_one_line(refusal):
    said = refusal("agent=greedy_gsi", "token_budget=100")
    assert said.startswith("error: ") and "of 100 tokens are spent" in said and "Traceback" not in said


def test_unknown_agent_is_refused_with_the_known_ones(refusal):
    said = refusal("agent=pppo")
    assert "agent/pppo" in said and "maskable_ppo" in said and "Traceback" not in said


def test_refusal_is_all_that_a_single_run_says(train_here, tmp_path):
    said, code = train_here(tmp_path / "cache", "experiment=smoke", "seed=-1", f"hydra.run.dir={tmp_path / 'run'}")
    assert (said, code) == ("", "error: seed: expected a whole number of at least 0; got -1")
