"""Draws and halves share no text, and kinds of one text score the same tokens."""

import json
from pathlib import Path

import pytest

from experiments.context_texts import Sizes, Texts
from rap_env.errors import UnknownName


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    for name in ("text", "lm_eval_tasks"):
        (folder / name).mkdir()
    for half in ("valid", "test"):
        (folder / "text" / f"wikitext2_{half}.txt").write_text(" ".join(f"{half}{n}" for n in range(4000)))
    chats = [{"question": f"q{n} " * 20, "choices": [f"a{n} " * 30], "gold": 0} for n in range(400)]
    (folder / "lm_eval_tasks" / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return folder


@pytest.fixture
def texts(tiny_llm, shared) -> Texts:
    return Texts(tiny_llm, shared, Sizes(2, 3, 8, search_items=2, report_items=3))


def test_draws_are_disjoint_and_every_reported_window_is_measured_alone(texts):
    one, other = (texts.search("dialogue 64", draw).windows for draw in (0, 1))
    reported = texts.report("dialogue 64")
    assert one.shape == other.shape == (2, 72) and [each.windows.shape for each in reported] == [(1, 72)] * 3
    rows = {tuple(row) for windows in (one, other, *(each.windows for each in reported)) for row in windows.tolist()}
    assert len(rows) == 7


def test_lengths_of_one_kind_of_text_score_the_same_tokens(texts):
    short, long = texts.search("prose 16", 1), texts.search("prose 1024", 1)
    assert (short.windows == long.windows[:, -24:]).all() and short.target_tokens == long.target_tokens == 8
    assert short.name != long.name


def test_draws_of_recall_are_other_items_of_the_search_half(texts):
    one, other = (texts.search("recall 128", draw).item_texts["rap_recall_128_search"] for draw in (0, 1))
    (reported,) = texts.report("recall 128")
    assert len(one) == len(other) == 2 and set(one).isdisjoint(other)
    assert list(reported.item_texts) == ["rap_recall_128_report"]


def test_an_unknown_kind_is_refused(texts):
    with pytest.raises(UnknownName, match="unknown kind of context 'poems'"):
        texts.search("poems 64", 0)
