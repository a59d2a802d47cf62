"""Parts of the comparison: requests, thresholds, answers that are kept, summaries, gamma, pictures."""

import json

import numpy as np
import pytest

from agents.selection_rivals import MARGINS
from experiments.report.gamma import gamma_by_layer, goodman_kruskal_gamma
from experiments.report.reranking import found_table, gamma_picture, reranking_table, trade_off_picture
from experiments.rerank_training.data import Collection, Document
from experiments.reranking.answers import Plan, ask_all
from experiments.reranking.heads import contrastive_scores
from experiments.reranking.process import SystemFailed
from experiments.reranking.recorded import recorded_paths
from experiments.reranking.requests import Request, packaged_collection, requests_of
from experiments.reranking.summary import Judges, summary
from experiments.reranking.systems import SYSTEMS, System, systems_of
from experiments.reranking.thresholds import lowest_margins, lowest_threshold
from rap_env.errors import InvalidConfig, UnknownName
from rap_env.rerank import ClusterRule
from rap_env.rerank.paths import ScorePaths


def test_gamma_counts_pairs_in_the_same_and_in_opposite_order():
    # Of six pairs (0, 3) and (2, 3) are reversed, (0, 1) is equal in the first: 3 are the same.
    first, second = np.array([1.0, 1.0, 2.0, 1.5]), np.array([3.0, 4.0, 5.0, 1.0])
    pairs = {(0, 2): 1, (0, 3): -1, (1, 2): 1, (1, 3): -1, (2, 3): 1}
    assert goodman_kruskal_gamma(first, second) == pytest.approx(sum(pairs.values()) / len(pairs))
    assert goodman_kruskal_gamma(second, -second) == -1
    assert np.isnan(goodman_kruskal_gamma(first, np.zeros(4)))
    assert gamma_by_layer(np.stack([-second, second])) == [-1, 1]


def test_packaged_queries_are_sentences_that_their_passage_has_lost():
    collection = packaged_collection(0)
    assert packaged_collection(0) == collection != packaged_collection(1)
    assert len(collection.documents) >= 60 and len(collection.queries) >= 20
    for name, query in collection.queries.items():
        assert query not in collection.documents[name].text
        assert collection.grades[name][name] == 2


def test_requests_have_one_size_and_begin_with_what_bm25_finds():
    documents = {name: Document("", text) for name, text in {"a": "red wing", "b": "blue flow", "c": "heat"}.items()}
    collection = Collection(documents, {"q": "flow of heat in a flow"}, {"q": {"c": 1}})
    (request,) = requests_of(collection, ["q"], 3)
    assert request.documents == {"b": "blue flow", "c": "heat", "a": "red wing"}
    with pytest.raises(InvalidConfig, match="at most the 3 documents"):
        requests_of(collection, ["q"], 4)


def test_the_lowest_threshold_is_the_last_one_that_still_agrees():
    # The first layer's spread is 1/3 and orders wrongly; the second one's is 1/2, and it has the final order.
    path = np.array([[1.0, 2.0], [3.0, 1.0], [4.0, 1.0]])
    threshold = lowest_threshold(ClusterRule(0.0), [path], 1, target=1.0)
    assert 1 / 3 <= threshold < 1 / 2
    assert lowest_threshold(ClusterRule(0.0), [path], 1, target=0.0) == pytest.approx(1 / 3)
    never = lowest_threshold(ClusterRule(0.0), [path[[0, 0, 1]]], 1, target=1.0)
    assert never >= 1 / 3


def test_the_lowest_margin_is_the_last_one_that_still_agrees():
    # The first layer is 1 apart and orders wrongly.
    path, noise = np.array([[1.0, 2.0], [3.0, 1.0], [4.0, 1.0]]), np.array([0.1, 0.1, 0.0])
    [margin] = lowest_margins(noise, [path], [2], [1], target=1.0).values()
    assert margin > 10 and max(each for each in MARGINS if each < margin) <= 10
    assert lowest_margins(noise, [path], [2], [1], target=0.0) == {(2, 1): min(MARGINS)} == {(2, 1): 0.05}
    assert lowest_margins(noise / 10, [path], [2], [1], target=1.0)[2, 1] > 1e8, "no margin is wide enough"


def test_each_number_of_candidates_needs_a_margin_of_its_own():
    # The third candidate is misjudged by much more than the second one.
    path = np.array([[1.0, 2.0, 9.0], [3.0, 1.0, 0.0], [4.0, 1.0, 0.0]])
    margins = lowest_margins(np.array([0.1, 0.1, 0.0]), [path], [2, 3], [1, 2], target=1.0)
    assert margins[2, 1] < margins[3, 1]
    assert margins[2, 2] == min(MARGINS), "all of them are returned, whoever is read on"


def test_recorded_paths_are_those_of_the_same_model_queries_and_candidates(tmp_path):
    scores = tuple(np.arange(6.0).reshape(2, 3) + number for number in range(2))
    source = {"model_digest": "a", "document_tokens": 12, "candidates": 3}
    ones = (np.ones(3),) * 2
    file = ScorePaths(("one", "two"), scores, ones, ones, source).save(tmp_path / "paths.npz")
    own = {"model_digest": "a", "document_tokens": 12}
    (path,) = recorded_paths(file, ["two"], 2, own)
    assert path.tolist() == [[1.0, 2.0], [4.0, 5.0]]
    for names, n, other, words in [
        (["two"], 2, own | {"model_digest": "b"}, "'model_digest': 'b'"),
        (["three", "one"], 2, own, "has none of three"),
        (["one"], 4, own, "of 4 candidates; .* has those of 3"),
    ]:
        with pytest.raises(InvalidConfig, match=words):
            recorded_paths(file, names, n, other)


class FakeProcess:
    """Answers so many commands, then ends."""

    catches_peaks = True

    def __init__(self, name: str, asked: list[str], lives: int = 99) -> None:
        self.name, self._asked, self._lives = name, asked, lives

    def rank(self, command):
        if not self._lives:
            raise SystemFailed(f"{self.name} ended with -9")
        self._lives -= 1
        self._asked.append(self.name)
        return {"seconds": 1.0, "ids": [0], "layers": 2.0, "read_bytes": None, "peak_bytes": 5}

    def close(self) -> None:
        pass


def test_systems_are_asked_in_turn_and_what_was_answered_is_not_asked_again(tmp_path):
    systems = {"first": System(), "second": System(prunes="margins"), "third": System()}
    plan = Plan([0, 1], [2], [1], 2, {("margins", False, 2, 1): 0.5})
    asked: list[str] = []

    def start(name: str) -> FakeProcess:
        return FakeProcess(name, asked, lives=1 if name == "third" else 99)

    answers, failed = ask_all(systems, plan, start, tmp_path, lambda done, total: None)
    turns = ["first", "second", "third", "first", "second", "second", "first", "second", "first"]
    assert asked == turns and failed == {"third": "third ended with -9"}
    assert {name: len(each) for name, each in answers.items()} == {"first": 4, "second": 4, "third": 1}
    assert {each["threshold"] for each in answers["second"]} == {0.5}
    with (tmp_path / "first.jsonl").open("a") as file:
        file.write('{"repeat": 0, "ran')  # it was killed here
    asked.clear()
    again, failed = ask_all(systems, plan, lambda name: FakeProcess(name, asked), tmp_path, lambda done, total: None)
    assert asked == ["third"] * 3 and failed == {} and again["first"] == answers["first"]
    assert len([json.loads(line) for line in (tmp_path / "first.jsonl").read_text().splitlines()]) == 4


def test_a_system_that_is_asked_less_often_is_asked_in_between(tmp_path):
    systems = {"full": System(), "pruned": System(prunes="margins")}
    plan = Plan([0, 1], [2], [1, 5, 10], 1, {("margins", False, 2, k): 0.5 for k in (1, 5, 10)})
    asked: list[str] = []
    ask_all(systems, plan, lambda name: FakeProcess(name, asked), tmp_path, lambda done, total: None)
    assert asked == ["pruned", "full", "pruned", "pruned"] * 2


def answer(number: int, ids: list[int], seconds: float, k: int | None = None, **changes) -> dict:
    told = {"rank": number, "candidates": 3, "top_k": k, "ids": ids, "seconds": seconds}
    return told | {"layers": 4.0, "read_bytes": 10 * number, "peak_bytes": 7} | changes


def test_a_summary_takes_medians_and_compares_with_the_full_order_and_with_labels():
    requests = [Request(name, "", dict.fromkeys("abc", "")) for name in ("q", "r")]
    judges = Judges(requests, {(0, 3): [0, 1, 2], (1, 3): [2, 1, 0]}, {"q": {"a": 1}, "r": {"a": 1}})
    answers = [answer(0, [0, 2, 1], seconds, peak_bytes=seconds) for seconds in (1.0, 2.0, 9.0)]
    answers += [answer(1, [2, 1, 0], seconds) for seconds in (4.0, 4.0, 5.0)]
    two = summary(answers, judges, [2])[0]
    assert (two["seconds"], two["peak_bytes"], two["read_bytes"], two["layers"]) == (3.0, 9.0, 5, 4.0)
    assert two["agreement"] == 0.75 and two["precision"] == 0.25
    assert two["ndcg_at_10"] == pytest.approx((1 + 1 / np.log2(4)) / 2)
    (row,) = summary([answer(0, [1], 1.0, k=1, read_bytes=None)], judges, [1, 2])
    assert row["ndcg_at_10"] is None and row["read_bytes"] is None and row["agreement"] == 0.0


def test_table_and_pictures_are_made_of_a_record_alone(tmp_path):
    row = {"candidates": 20, "top_k": 5, "seconds": 2.0, "peak_bytes": 4e8, "agreement": 1.0, "precision": 0.2}
    row |= {"ndcg_at_10": None, "layers": 30.0, "read_bytes": None}
    fast = row | {"seconds": 1.0, "peak_bytes": 1e8, "read_bytes": 2e8, "ndcg_at_10": 0.5}
    found = {"bm25": [{"candidates": 20, "ndcg_at_10": 0.4}]}
    results = found | {"systems": {"hf": [row], "fast": [fast]}, "gamma": [[0.0, None, 1.0], [0.5, 0.5, 1.0]]}
    rows = reranking_table({"results": results}).rows
    assert rows[1][2:9] == ["fast", "1.00", "50%", "100", "25%", "30.0", "200"]
    assert found_table({"results": results}).rows == [["20", "fast", "0.500"], ["20", "bm25", "0.400"]]
    for draw in (trade_off_picture, gamma_picture):
        assert draw({"results": results}, tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_contrastive_scores_prefer_heads_that_attend_to_relevant_documents():
    attention = np.array([[[0.003, 0.001, 0.001], [0.001, 0.003, 0.001], [0.5, 0.4, -0.9]]])
    e = np.exp(1)
    expected = [e**3 / (e**3 + 2 * e), e / (2 * e + e**3), 1.0]
    assert contrastive_scores(attention, [True, False, False])[0] == pytest.approx(expected)
    assert contrastive_scores(attention, [True, False, True])[0, 1] == pytest.approx(e / (e + e**3))


def test_systems_are_looked_up_by_name():
    assert list(systems_of(["full", "hf"])) == ["full", "hf"]
    assert all(each.missing_package is None for name, each in SYSTEMS.items() if each.reads == "reranker")
    with pytest.raises(UnknownName, match="unknown system 'fulll'; did you mean full"):
        systems_of(["fulll"])
