"""Search and report halves share no text, follow the perplexity protocol, and come from each evaluation's YAML."""

import json
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from experiments.evaluators import halves_at_length, packaged_text_halves, task_halves, text_halves, without_overlaps
from experiments.recipes.build import build_corpus, build_halves, build_windows
from rap_env.calibration import Corpus, consecutive_windows, local_text, packaged_corpus, refuse_contamination
from rap_env.calibration.kinds import prose
from rap_env.errors import ContaminationFound, CorpusUnavailable, InvalidWorkload, UnknownName
from rap_env.evaluation.divergence import DivergenceEvaluator
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


@pytest.fixture
def benchmark(tmp_path):
    """Writes a task of yes-or-no questions, and says where its YAML is."""

    def write(questions: list[str], name: str = "quiz") -> str:
        rows = [{"question": question, "choices": ["yes", "no"], "gold": 0} for question in questions]
        (tmp_path / f"{name}_items.py").write_text(
            f"from datasets import Dataset\n\n\ndef load(**_):\n"
            f"    return {{'validation': Dataset.from_list({rows!r})}}\n"
        )
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\noutput_type: multiple_choice\ncustom_dataset: !function {name}_items.load\n"
            "validation_split: validation\ndoc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: gold\n"
            "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\nmetadata: {version: 1.0}\n"
        )
        return str(tmp_path)

    return write


def halves_of(llm, paths: dict, **changes):
    return text_halves(llm, **paths | {"search_windows": (4, 32), "report_windows": (3, 40)} | changes)


def composed(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def test_the_report_is_the_perplexity_of_the_texts_first_windows(tiny_llm, paths):
    windows = consecutive_windows(REPORT_TEXT, tiny_llm.tokenizer, 40, 3)
    expected = PerplexityEvaluator(windows, "test.txt").evaluate(tiny_llm)
    evaluation = halves_of(tiny_llm, paths).report.evaluate(tiny_llm)
    assert evaluation == expected and evaluation.tasks["test.txt"]["items"] == 3


def test_the_search_draws_its_windows_by_seed_and_from_its_own_text(tiny_llm, paths):
    one, same, other = (halves_of(tiny_llm, paths, seed=seed).search.identity for seed in (0, 0, 1))
    assert one == same != other
    halves = halves_of(tiny_llm, paths)
    assert halves.search_text.documents == (SEARCH_TEXT.removeprefix(" \n"),)
    assert "hill0 stands" in halves.reported["test.txt"][0] and halves.held_out == halves.reported


def test_the_search_goes_by_loss_or_by_divergence(tiny_llm, paths):
    assert isinstance(halves_of(tiny_llm, paths).search, PerplexityEvaluator)
    assert isinstance(halves_of(tiny_llm, paths, fitness="divergence").search, DivergenceEvaluator)
    with pytest.raises(UnknownName, match="unknown fitness 'los'; did you mean loss"):
        halves_of(tiny_llm, paths, fitness="los")


def test_text_that_is_searched_and_reported_on_is_refused(tiny_llm, paths):
    with pytest.raises(ContaminationFound, match=r"'valid\.txt' overlaps with \d evaluation items"):
        halves_of(tiny_llm, paths | {"report_paths": paths["search_paths"]}, report_windows=(3, 200))


def test_missing_or_short_text_is_refused(tiny_llm, paths):
    with pytest.raises(CorpusUnavailable, match=r"no_such\.txt"):
        halves_of(tiny_llm, paths | {"report_paths": ["no_such.txt"]})
    with pytest.raises(CorpusUnavailable, match="100 samples of 32 tokens need 3,200"):
        halves_of(tiny_llm, paths, search_windows=(100, 32))


@pytest.mark.parametrize("which", ["search_windows", "report_windows"])
def test_windows_that_the_model_can_not_be_measured_on_are_refused(tiny_llm, paths, which):
    context = tiny_llm.shape.context_tokens
    with pytest.raises(InvalidWorkload, match=f"windows of {context + 1:,} tokens are beyond the model's context"):
        halves_of(tiny_llm, paths, **{which: (1, context + 1)})
    with pytest.raises(InvalidWorkload, match="got 0 of 32"):
        halves_of(tiny_llm, paths, **{which: (0, 32)})
    with pytest.raises(InvalidWorkload, match="got 2 of 1"):
        halves_of(tiny_llm, paths, **{which: (2, 1)})


def test_calibration_windows_beyond_the_models_context_are_refused(tiny_llm):
    config = composed(f"calibration.tokens_per_sample={tiny_llm.shape.context_tokens + 1}")
    corpus = Corpus("long", ("word " * 20000,))
    with pytest.raises(InvalidWorkload, match="beyond the model's context"):
        build_windows(config, corpus, tiny_llm, 0)


def test_raw_text_keeps_what_documents_leave_out(paths):
    assert local_text(paths["search_paths"] + paths["report_paths"]) == SEARCH_TEXT + REPORT_TEXT


def test_packaged_halves_are_the_even_and_the_odd_documents(tiny_llm):
    halves = packaged_text_halves(tiny_llm, (2, 32), (2, 32), seed=1)
    documents = packaged_corpus("evaluation").documents
    assert halves.search_text.documents == documents[0::2]
    (reported,) = halves.reported.values()
    assert documents[1].startswith(reported[0]) and reported[0] and "".join(reported) in "".join(documents[1::2])
    assert halves.search.evaluate(tiny_llm).score != halves.report.evaluate(tiny_llm).score
    by_divergence = packaged_text_halves(tiny_llm, (2, 32), (2, 32), seed=1, fitness="divergence").search
    assert isinstance(by_divergence, DivergenceEvaluator) and (by_divergence.windows == halves.search.windows).all()


def test_tasks_may_be_searched_by_another_metric_than_they_are_reported_by(tiny_llm):
    halves = task_halves(["rap_search"], ["rap_report"], limit=2, fitness="smooth_acc")
    for half, metric in ((halves.search, "smooth_acc"), (halves.report, "acc")):
        evaluation = half.evaluate(tiny_llm)
        assert evaluation.score == evaluation.mean(metric)


def test_tasks_hold_out_what_is_searched_on_too():
    halves = task_halves(["rap_search"], ["rap_report"], limit=2)
    assert len(halves.held_out) == len(halves.search.item_texts) + len(halves.report.item_texts) == 12
    assert halves.reported == halves.report.item_texts
    assert halves.counts == {"repeated_items": 0, "unchecked_items": 24}  # all of them are short


def test_items_of_both_halves_of_one_task_are_held_out(benchmark):
    questions = [" ".join(f"word{number}x{place}" for place in range(14)) for number in range(6)]
    halves = task_halves(["quiz"], include_path=benchmark(questions))
    assert halves.counts["unchecked_items"] == 0
    for number, place in enumerate(f"{half} half) item {item}" for item in range(3) for half in ("search", "report")):
        with pytest.raises(ContaminationFound, match=rf"with 1 evaluation items: .* and quiz \({re.escape(place)}:"):
            refuse_contamination(Corpus("notes", (questions[number],)), halves.held_out)


def test_an_item_that_both_halves_have_is_left_out_of_the_search_and_counted(benchmark):
    questions = [f"Question {number}" for number in range(8)]
    folder = benchmark([*questions, "Question  1", questions[3]])  # items 8 and 9; 8 repeats an odd one, 9 does not
    halves = task_halves(["quiz"], include_path=folder)
    assert halves.search.item_texts["quiz"] == [f"Question {number} yes" for number in (0, 2, 4, 6)]
    assert halves.report.item_texts["quiz"] == [f"Question {number} yes" for number in (1, 3, 5, 7, 3)]
    assert halves.search_text.documents == tuple(halves.search.item_texts["quiz"])
    assert halves.counts == {"repeated_items": 1, "unchecked_items": 9}


@pytest.mark.parametrize("other", ["CAF\u00c9 au lait?", "cafe\u0301 au lait?", "caf\u00e9 au\u200b\u00a0lait\uff1f"])
def test_an_item_that_is_written_in_another_way_is_repeated_too(benchmark, other):
    folder = benchmark(["a", "caf\u00e9 au lait?", other, "b", "caf\u00e9 au lait!", "cafe au lait?"])
    halves = task_halves(["quiz"], include_path=folder)
    assert halves.search.item_texts["quiz"] == ["a yes", "caf\u00e9 au lait! yes"] and halves.repeated_items == 1


def test_an_item_that_another_task_repeats_is_left_out_of_the_search(benchmark):
    benchmark(["a", "b", "c"], "quiz")
    folder = benchmark(["d", "b"], "exam")
    halves = task_halves(["quiz"], ["exam"], include_path=folder)
    assert halves.search.item_texts == {"quiz": ["a yes", "c yes"]} and halves.repeated_items == 1


def test_a_task_that_would_be_searched_and_reported_on_is_refused(benchmark):
    with pytest.raises(
        ContaminationFound, match=r"all 2 items that 'rap_\w+_search' would be searched on are reported"
    ):
        task_halves(["rap_search"], ["rap_search"], limit=2)
    with pytest.raises(ContaminationFound, match="all 1 items that 'quiz' would be searched on are reported on"):
        task_halves(["quiz"], include_path=benchmark(["same", "same"]))


def test_a_tilde_in_include_path_is_the_home_folder(benchmark, monkeypatch):
    monkeypatch.setenv("HOME", benchmark(["a", "b"]))
    assert task_halves(["quiz"], include_path="~").search.item_texts == {"quiz": ["a yes"]}


def at_length(llm, paths: dict, **changes):
    corpora = prose(**paths)
    sizes = {"context_tokens": 20, "target_tokens": 8, "longest_tokens": 40, "search_windows": 3, "report_windows": 2}
    return halves_at_length(llm, corpora, **sizes | changes)


def test_at_every_length_the_same_tokens_are_scored(tiny_llm, paths):
    long, short = (at_length(tiny_llm, paths, context_tokens=tokens) for tokens in (40, 5))
    for half in ("search", "report"):
        windows, cut = (getattr(halves, half).windows for halves in (long, short))
        assert windows.shape[1] == 48 and cut.shape[1] == 13 and (windows[:, -13:] == cut).all()
        assert getattr(long, half).target_tokens == getattr(short, half).target_tokens == 8
        assert getattr(long, half).identity != getattr(short, half).identity
    assert short.held_out == long.held_out, "none may search on what is context elsewhere"


def test_the_seed_draws_what_is_searched_on_only(tiny_llm, paths):
    one, other = (at_length(tiny_llm, paths, seed=seed) for seed in (0, 1))
    assert one.search.identity != other.search.identity and one.report.identity == other.report.identity
    assert isinstance(at_length(tiny_llm, paths, fitness="divergence").search, DivergenceEvaluator)


def test_lengths_that_do_not_fit_are_refused(tiny_llm, paths):
    with pytest.raises(InvalidWorkload, match="at most 48 together; got 41 and 8"):
        at_length(tiny_llm, paths, context_tokens=41)
    with pytest.raises(InvalidWorkload, match="beyond the model's context"):
        at_length(tiny_llm, paths, longest_tokens=tiny_llm.shape.context_tokens)
    with pytest.raises(UnknownName, match="unknown fitness 'los'"):
        at_length(tiny_llm, paths, fitness="los")


def test_documents_that_are_reported_on_are_not_searched_on():
    own, shared = (" ".join(f"{word}{number}" for number in range(20)) for word in ("own", "shared"))
    corpus = Corpus("notes", (own, f"and {shared}"))
    assert without_overlaps(corpus, {"report": [shared]}).documents == (own,)
    with pytest.raises(CorpusUnavailable, match="holds no text"):
        without_overlaps(corpus, {"report": [shared, own]})


@pytest.mark.parametrize(
    "name", ["packaged_text", "text", "embedded", "prose", "code", "dialogue", "questions", "recall"]
)
def test_each_evaluations_yaml_builds_both_halves(name, tiny_llm, paths, tmp_path):
    chats = [{"question": f"q{n} " * 20, "choices": [f"a{n} " * 30], "gold": 0} for n in range(60)]
    passages = [{"question": f"is {n}", "passage": f"p{n} " * 60, "label": n % 2} for n in range(20)]
    for file, rows in (("chats", chats), ("passages", passages)):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = ["context_tokens=16", "longest_tokens=32", "target_tokens=8", "search_windows=2", "report_windows=2"]
    windows = ["search_windows=[2,16]", "report_windows=[2,16]"]
    changes = {
        "packaged_text": windows,
        "text": [f"{key}={value}" for key, value in paths.items()] + windows,
        "embedded": ["limit=2"],
        "prose": [f"corpora.{key}={value}" for key, value in paths.items()] + lengths,
        "code": lengths,
        "dialogue": [f"corpora.path={tmp_path}/chats.jsonl", *lengths],
        "questions": [f"corpora.path={tmp_path}/passages.jsonl", *lengths],
        "recall": ["limit=2"],
    }
    overrides = [f"evaluation={name}", "calibration=search", *(f"evaluation.{change}" for change in changes[name])]
    config = composed(*overrides)
    halves = build_halves(config.evaluation, tiny_llm)
    assert halves.search.identity != halves.report.identity
    assert build_corpus(config, lambda: halves.search_text) == halves.search_text


@pytest.mark.parametrize("name", ["packaged", "local", "wikitext2", "search", "ccds"])
def test_the_smoke_experiment_leaves_every_source_of_calibration_text_its_own_keys(name):
    own = composed(f"calibration={name}").calibration.corpus
    assert composed(f"calibration={name}", "experiment=smoke").calibration.corpus == own


def test_violating_a_budget_never_pays_on_text(tiny_llm, paths):
    weights = composed("reward=loss").reward
    problem = PruningProblem(tiny_llm, halves_of(tiny_llm, paths).search, reward_weights=weights)
    dense, work = PruningMask.all_kept(tiny_llm.shape), Workload(4, 512)
    everything = PruningMask(dense.components, (False,) * len(dense.components))
    smallest = problem.evaluate(everything, work, 10**9).footprint.peak_bytes
    fitting, violating = (problem.evaluate(mask, work, smallest) for mask in (everything, dense))
    assert problem.reward(fitting) == fitting.score
    assert problem.reward(violating) < fitting.score - 50
