"""Search and report halves share no text, follow the perplexity protocol, and come from each evaluation's YAML."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from experiments.build import build_corpus, build_judges
from experiments.judges import searched_corpus, self_text_judges, task_judges, text_judges
from rap_env.calibration import consecutive_windows, find_overlaps, local_text
from rap_env.errors import ContaminationFound, CorpusUnavailable
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.mask import PruningMask
from rap_env.memory.workload import Workload
from rap_env.problem import PruningProblem

CONF = Path(__file__).parents[2] / "conf"
SEARCH_TEXT = " \n = Rivers = \n\n" + " ".join(f"river{number} flows into lake{number % 7}" for number in range(80))
REPORT_TEXT = " \n = Hills = \n\n" + " ".join(f"hill{number} stands behind town{number % 5}" for number in range(80))


@pytest.fixture
def paths(tmp_path) -> dict[str, list[str]]:
    (tmp_path / "valid.txt").write_text(SEARCH_TEXT)
    (tmp_path / "test.txt").write_text(REPORT_TEXT)
    return {"search_paths": [str(tmp_path / "valid.txt")], "report_paths": [str(tmp_path / "test.txt")]}


def judge(llm, paths: dict, **changes):
    return text_judges(llm, **paths | {"search_windows": (4, 32), "report_windows": (3, 40)} | changes)


def test_the_report_is_the_perplexity_of_the_texts_first_windows(tiny_llm, paths):
    windows = consecutive_windows(REPORT_TEXT, tiny_llm.tokenizer, 40, 3)
    expected = PerplexityEvaluator(windows, "test.txt").evaluate(tiny_llm)
    judged = judge(tiny_llm, paths).report.evaluate(tiny_llm)
    assert judged == expected and judged.tasks["test.txt"]["items"] == 3


def test_the_search_draws_its_windows_by_seed_and_from_its_own_text(tiny_llm, paths):
    one, same, other = (judge(tiny_llm, paths, seed=seed).search.identity for seed in (0, 0, 1))
    assert one == same != other
    judges = judge(tiny_llm, paths)
    assert judges.search_text.documents == (SEARCH_TEXT.removeprefix(" \n"),)
    assert "hill0 stands" in judges.reported["test.txt"][0] and judges.held_out == judges.reported


def test_text_that_is_searched_and_reported_on_is_refused(tiny_llm, paths):
    with pytest.raises(ContaminationFound, match=r"'valid\.txt' overlaps with \d evaluation items"):
        judge(tiny_llm, paths | {"report_paths": paths["search_paths"]}, report_windows=(3, 200))


def test_missing_or_short_text_is_refused(tiny_llm, paths):
    with pytest.raises(CorpusUnavailable, match=r"no_such\.txt"):
        judge(tiny_llm, paths | {"report_paths": ["no_such.txt"]})
    with pytest.raises(CorpusUnavailable, match="100 samples of 32 tokens need 3,200"):
        judge(tiny_llm, paths, search_windows=(100, 32))


def test_raw_text_keeps_what_documents_leave_out(paths):
    assert local_text(paths["search_paths"] + paths["report_paths"]) == SEARCH_TEXT + REPORT_TEXT


def test_self_generated_halves_share_nothing(tiny_llm, tmp_path):
    judges = self_text_judges(tiny_llm, tmp_path, (4, 120), (2, 32), (2, 32), seed=1)
    assert len(judges.search_text.documents) <= 2 and not find_overlaps(judges.search_text.documents, judges.reported)
    assert judges.search.evaluate(tiny_llm).score != judges.report.evaluate(tiny_llm).score


def test_recited_documents_stay_out_of_the_search_half(tiny_llm, tmp_path, monkeypatch):
    documents = [f"{word} " * 60 for word in ("aa", "bb", "cc", "bb")]
    sampled = type("Sampled", (), {"name": "sampled", "documents": tuple([*documents, "dd " * 60, "aa " * 60])})
    monkeypatch.setattr("experiments.judges.self_generated_corpus", lambda *arguments: sampled)
    judges = self_text_judges(tiny_llm, tmp_path, (6, 60), (2, 16), (2, 16))
    assert judges.search_text.documents == ("cc " * 60, "dd " * 60)  # "aa" is repeated by the last, an odd one


def test_tasks_hold_out_what_is_searched_on_too(tiny_llm):
    judges = task_judges(["rap_search"], ["rap_report"], limit=2)
    assert judges.held_out.keys() == judges.search.item_texts.keys() | judges.report.item_texts.keys()
    assert judges.reported.keys() == judges.report.item_texts.keys()
    with pytest.raises(ContaminationFound, match="would report on an item that"):
        task_judges(["rap_search"], ["rap_search"], limit=2)


@pytest.mark.parametrize("name", ["self_text", "text", "embedded"])
def test_each_evaluations_yaml_builds_both_halves(name, tiny_llm, paths, tmp_path, monkeypatch):
    monkeypatch.setenv("RAP_CACHE", str(tmp_path))
    changes = {
        "self_text": ["documents=[4,120]", "search_windows=[2,16]", "report_windows=[2,16]"],
        "text": [f"{key}={value}" for key, value in paths.items()] + ["search_windows=[2,16]", "report_windows=[2,16]"],
        "embedded": ["limit=2"],
    }
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = [f"evaluation={name}", "calibration=search", *(f"evaluation.{change}" for change in changes[name])]
        config = compose("config", overrides=overrides)
    judges = build_judges(config.evaluation, tiny_llm)
    assert judges.search.identity != judges.report.identity
    assert build_corpus(config, tiny_llm, judges.search_text) == searched_corpus(judges.search_text)


def test_violating_a_budget_never_pays_on_text(tiny_llm, paths):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        weights = compose("config", overrides=["reward=loss"]).reward
    problem = PruningProblem(tiny_llm, judge(tiny_llm, paths).search, reward_weights=weights)
    dense, work = PruningMask.all_kept(tiny_llm.shape), Workload(4, 512)
    everything = PruningMask(dense.components, (False,) * len(dense.components))
    smallest = problem.evaluate(everything, work, 10**9).footprint.peak_bytes
    fitting, violating = (problem.evaluate(mask, work, smallest) for mask in (everything, dense))
    assert problem.reward(fitting) == fitting.score
    assert problem.reward(violating) < fitting.score - 50


def test_what_judging_takes_is_predicted(tiny_llm, paths):
    search = judge(tiny_llm, paths).search
    assert 0 < search.peak_bytes(tiny_llm) < search.peak_bytes(tiny_llm, 8)
    assert task_judges(["rap_search"], ["rap_report"], limit=2).search.peak_bytes(tiny_llm) > 0
