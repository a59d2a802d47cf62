"""Evaluations that are mixed for the search: the report of one, and no text on both sides of any of them."""

import json

import pytest
from omegaconf import OmegaConf

from experiments.recipes.build import build_halves
from rap_env.errors import ContaminationFound, InvalidConfig, UnknownName
from tests.experiments.test_evaluators import composed, paths  # noqa: F401 - a fixture

SMALL = ("evaluation.parts.text.search_windows=[4,32]", "evaluation.parts.text.report_windows=[3,40]")


def evaluation_of(paths: dict, *overrides: str):  # noqa: F811
    texts = [f"evaluation.parts.text.{name}={given}" for name, given in paths.items()]
    return composed("evaluation=text_and_recall", *SMALL, *texts, *overrides).evaluation


def test_text_and_recall_search_by_both_and_report_the_text(tiny_llm, paths):  # noqa: F811
    halves = build_halves(evaluation_of(paths), tiny_llm)
    evaluation = halves.search.evaluate(tiny_llm)
    recall = {f"rap_recall_{tokens}_search" for tokens in (128, 256)}
    assert set(evaluation.tasks) == {"valid.txt", *recall}
    assert all(evaluation.tasks[name]["items"] == 4 for name in recall)
    assert set(halves.report.evaluate(tiny_llm).tasks) == {"test.txt"}
    assert halves.search_text.name == "valid.txt" and len(halves.also_searched[0].documents) == 8
    assert set(halves.held_out) >= {"text: test.txt", "recall: rap_recall_128_search (search half)"}


def test_parts_may_be_told_in_any_order(tiny_llm, paths):  # noqa: F811
    config = evaluation_of(paths)
    recorded = OmegaConf.create(json.loads(json.dumps(OmegaConf.to_container(config, resolve=True), sort_keys=True)))
    assert list(recorded.parts) != list(config.parts)
    told, again = build_halves(config, tiny_llm), build_halves(recorded, tiny_llm)
    assert again.search.identity == told.search.identity and again.report.identity == told.report.identity
    assert again.search_text.name == told.search_text.name


def test_the_reported_part_is_one_of_them(tiny_llm, paths):  # noqa: F811
    with pytest.raises(UnknownName, match="part of the evaluation 'tasks'"):
        build_halves(evaluation_of(paths, "evaluation.reported=tasks"), tiny_llm)


def test_weights_are_those_of_the_parts(tiny_llm, paths):  # noqa: F811
    with pytest.raises(InvalidConfig, match="expected those of text, recall; got text, recall, more"):
        build_halves(evaluation_of(paths, "+evaluation.weights.more=1"), tiny_llm)


def test_a_part_that_another_one_reports_is_refused(tiny_llm, paths):  # noqa: F811
    config = OmegaConf.to_container(evaluation_of(paths), resolve=True)
    text = config["parts"]["text"] | {"report_windows": [3, 200]}
    swapped = text | {"search_paths": text["report_paths"], "report_paths": text["search_paths"]}
    config |= {"parts": {"text": text, "swapped": swapped}, "weights": {"text": 1.0, "swapped": 1.0}}
    with pytest.raises(ContaminationFound, match=r"valid\.txt"):
        build_halves(OmegaConf.create(config), tiny_llm)


def kinds_of(paths: dict, tmp_path, *overrides: str):  # noqa: F811
    """Prose and dialogue alone, of few tokens."""
    rows = [{"question": f"What is {n} and {n}?", "choices": [f"It is {2 * n}.", "No."], "gold": 0} for n in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = {"context_tokens": 16, "target_tokens": 8, "longest_tokens": 16, "search_windows": 2, "report_windows": 3}
    given = {f"prose.{key}": value for key, value in sizes.items()} | {f"dialogue.{key}": v for key, v in sizes.items()}
    given |= {f"prose.corpora.{name}": files for name, files in paths.items()}
    given["dialogue.corpora.path"] = tmp_path / "rows.jsonl"
    options = [f"evaluation.kinds.{key}={value}" for key, value in given.items()]
    return composed("evaluation=kinds", *options, "~evaluation.kinds.code", "~evaluation.kinds.questions", *overrides)


def test_kinds_are_searched_and_reported_together_and_their_text_knows_its_kind(tiny_llm, paths, tmp_path):  # noqa: F811
    halves = build_halves(kinds_of(paths, tmp_path).evaluation, tiny_llm)
    assert halves.search.kinds == halves.report.kinds == ("dialogue", "prose")
    found = halves.report.evaluate(tiny_llm)
    assert found.of("prose").tasks["test.txt"]["items"] == 3
    assert found.score == pytest.approx((found.of("prose").score + found.of("dialogue").score) / 2, abs=1e-12)
    text = halves.search_text
    assert set(text.kinds) == {"dialogue", "prose"} and len(text.kinds) == len(text.documents)
    assert {
        "User:" in document for document, kind in zip(text.documents, text.kinds, strict=True) if kind == "prose"
    } == {False}
    assert set(halves.reported) == {"prose: test.txt", "dialogue: dialogue of rows.jsonl, odd"}


def test_a_kind_that_another_one_reports_is_refused(tiny_llm, paths, tmp_path):  # noqa: F811
    config = OmegaConf.to_container(kinds_of(paths, tmp_path).evaluation, resolve=True)
    prose = config["kinds"]["prose"]
    swapped = {name: prose["corpora"][other] for name, other in zip(paths, reversed(paths), strict=True)}
    longer = {"context_tokens": 180, "longest_tokens": 180, "search_windows": 1, "report_windows": 1}
    config["kinds"]["swapped"] = prose | longer | {"corpora": prose["corpora"] | swapped}
    with pytest.raises(ContaminationFound):
        build_halves(OmegaConf.create(config), tiny_llm)
