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
