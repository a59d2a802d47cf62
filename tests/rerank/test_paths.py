"""Score paths are recorded, written and read again as they are, and other files are refused in one line."""

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest

from rap_env.errors import PathsUnreadable, RankingFailed
from rap_env.rerank.clusters import ClusterRule
from rap_env.rerank.outcomes import Outcome, replayed
from rap_env.rerank.paths import ScorePaths
from rap_env.rerank.recording import Request, record_paths
from rap_env.rerank.reranker import Reranker
from rap_env.rerank.selection import replay
from rap_env.rerank.similarity import SimilarityExit
from rap_env.rerank.synthetic import synthetic_paths
from tests.rerank.cases import DOCUMENTS, N_LAYERS, QUERY, tiny


def by_hand() -> ScorePaths:
    return ScorePaths(
        ("eins", "zweiß"),
        (np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]), np.array([[0.5, -1.0], [0.25, 1e-3]])),
        (np.array([10, 20, 30]), np.array([5, 7])),
        (np.array([0.0, 1.0, np.nan]), np.array([2.0, 0.0])),
        {"model": "ünd", "layers": [1, 2]},
    )


def test_what_was_saved_is_loaded_and_nothing_is_written_twice(tmp_path):
    paths, file = by_hand(), tmp_path / "new" / "paths.npz"
    assert paths.save(file) == file
    again = ScorePaths.load(file)
    assert again.queries == paths.queries and again.provenance == paths.provenance
    for name in ("scores", "tokens", "grades"):
        for ours, theirs in zip(getattr(paths, name), getattr(again, name), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    with np.load(file, allow_pickle=False) as arrays:
        assert {arrays[name].dtype.kind for name in arrays.files} <= set("iuf")
    with pytest.raises(FileExistsError):
        paths.save(file)


def with_similarities() -> ScorePaths:
    return dataclasses.replace(by_hand(), similarities=(np.array([0.9, 0.1, 0.2]), np.array([-1.0, 0.5])))


def test_similarities_are_kept_and_files_of_the_form_without_them_are_read(tmp_path):
    file = with_similarities().save(tmp_path / "paths.npz")
    again = ScorePaths.load(file)
    assert [own.tolist() for own in again.similarities] == [[0.9, 0.1, 0.2], [-1.0, 0.5]]
    assert [own.tolist() for own in again.part(["zweiß"]).similarities] == [[-1.0, 0.5]]
    file.write_bytes(changed(file, form=np.array(1), similarities=None))
    assert ScorePaths.load(file).similarities == () == ScorePaths.load(file).part(["eins"]).similarities


def test_the_first_candidates_of_each_query_are_what_a_smaller_request_has():
    few = with_similarities().first(2)
    assert [scores.tolist() for scores in few.scores] == [[[1.0, 2.0], [3.0, 2.0]], [[0.5, -1.0], [0.25, 1e-3]]]
    assert [own.tolist() for own in few.similarities] == [[0.9, 0.1], [-1.0, 0.5]]
    assert few.tokens[0].tolist() == [10, 20] and len(few.grades[0]) == 2 and few.queries == by_hand().queries


def test_an_exit_by_similarity_reads_no_layer_of_who_leaves():
    path, tokens = np.array([[1.0, 2.0, 3.0, 0.0], [4.0, 2.0, 3.0, 1.0]]), np.array([10, 20, 30, 40])
    similarities = np.array([0.9, 0.1, 0.5, 0.5])  # their standard deviation is 0.283
    ranking = SimilarityExit(0.0).replay(path, similarities, 1)
    assert (ranking.ids, ranking.layers) == ((0,), (2, 0, 0, 0)) and np.isnan(ranking.scores[1:]).all()
    assert replayed(path, tokens, SimilarityExit(0.0), 1, similarities) == Outcome(1.0, 2 / 8, 20 / 200)
    assert SimilarityExit(1.5).kept(similarities, 1) == [0, 2, 3]
    assert SimilarityExit(0.0).kept(similarities, 2) == [0, 2, 3]  # equal ones are not parted
    assert SimilarityExit(0.0).kept(similarities, None) == SimilarityExit(0.0).kept(similarities, 4) == [0, 1, 2, 3]
    with pytest.raises(RankingFailed, match="recorded without"):
        replayed(path, tokens, SimilarityExit(0.0), 1)
    with pytest.raises(RankingFailed, match="at least 0; got -1"):
        SimilarityExit(-1)


def test_parts_and_spreads():
    paths = by_hand()
    assert paths.n_layers == 2 and paths.part(["zweiß"]).tokens[0].tolist() == [5, 7]
    np.testing.assert_allclose(paths.spreads(), np.median([[(2 / 3) ** 0.5] * 2, [0.75, 0.1245]], axis=0))
    flat = ScorePaths(("q",), (np.ones((2, 3)),), (np.ones(3, int),), (np.ones(3),), {})
    assert flat.spreads().tolist() == [1.0, 1.0]


def changed(file, **arrays) -> bytes:
    with np.load(file) as loaded:
        content = {name: loaded[name] for name in loaded.files} | arrays
    out = io.BytesIO()
    np.savez(out, **{name: array for name, array in content.items() if array is not None})
    return out.getvalue()


def text(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"form": np.array(3)}, "expected form 1 or 2; got 3"),
        ({"counts": None}, "not an .npz file of score paths: .*counts"),
        ({"scores": np.zeros((2, 5), "float32")}, "expected scores of type float64; got float32"),
        ({"scores": np.array([[1, "a"]], dtype=object)}, "not an .npz file of score paths: Object arrays"),
        ({"counts": np.array([3, 3])}, "expected scores of 6 candidates; got 5"),
        ({"counts": np.array([5, 0])}, "expected scores of 5 candidates"),
        ({"scores": np.full((2, 5), np.nan)}, "query 'eins': expected finite scores"),
        ({"scores": np.zeros((1, 5))}, "at least two; got"),
        ({"scores": np.zeros(5)}, r"expected scores \[layers, n\]"),
        ({"tokens": np.zeros(5, int)}, "at least one token each"),
        ({"grades": np.zeros(4)}, "expected tokens and grades for each candidate"),
        ({"similarities": np.zeros(4)}, "a finite one of each candidate, or none"),
        ({"similarities": np.full(5, np.nan)}, "a finite one of each candidate, or none"),
        ({"similarities": None}, "not an .npz file of score paths: .*similarities"),
        ({"names": text(["a", "a"])}, "a name of its own for each"),
        ({"names": text(["a"])}, "expected scores, tokens and grades for each query"),
        ({"names": np.frombuffer(b"\xff{", np.uint8)}, "paths.npz: "),
    ],
)
def test_files_that_hold_something_else_are_refused(arrays, message, tmp_path):
    file = by_hand().save(tmp_path / "paths.npz")
    file.write_bytes(changed(file, **arrays))
    with pytest.raises(PathsUnreadable, match=message):
        ScorePaths.load(file)


def test_files_that_are_cut_or_changed_anywhere_are_refused_or_read_as_they_were(tmp_path):
    file = by_hand().save(tmp_path / "paths.npz")
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    for content in (b"", b"no zip", whole[:50], whole[:-30], whole[len(whole) // 2 :]):
        file.write_bytes(content)
        with pytest.raises(PathsUnreadable, match=r"paths\.npz: not an \.npz file of score paths"):
            ScorePaths.load(file)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        with contextlib.suppress(PathsUnreadable):
            assert ScorePaths.load(file).queries == by_hand().queries
    with pytest.raises(FileNotFoundError):
        ScorePaths.load(tmp_path / "none.npz")


def test_recorded_paths_are_those_of_the_reranker():
    reranker, told = Reranker(tiny()), []
    requests = [Request("a", QUERY, DOCUMENTS, [1.0] * len(DOCUMENTS)), Request("b", "beta", DOCUMENTS[:3])]
    paths = record_paths(reranker, requests, {"model": "tiny"}, told.append)
    assert told == [1, 2] and paths.queries == ("a", "b") and paths.n_layers == N_LAYERS
    np.testing.assert_array_equal(paths.scores[0], reranker.score_path(QUERY, DOCUMENTS))
    np.testing.assert_array_equal(paths.similarities[0], reranker.similarities(QUERY, DOCUMENTS))
    assert np.isnan(paths.grades[1]).all() and (paths.grades[0] == 1.0).all()
    tokens = paths.tokens[0]
    assert tokens[0] == tokens[5] and tokens[1] == tokens.min() and tokens[2] == tokens.max()


def test_an_outcome_by_hand():
    path = np.array([[9.0, 8.0, 1.0, 1.1], [1.0, 9.0, 8.0, 0.0], [0.0, 0.0, 0.0, 0.0]])[:2]
    tokens = np.array([10, 20, 30, 40])
    assert replayed(path, tokens, None, 2) == Outcome(1.0, 1.0, 1.0)
    assert replayed(path, tokens, ClusterRule(0.1), 2) == Outcome(0.5, 0.5, 0.5)  # all leave after the first layer
    keeping = replayed(path, tokens, ClusterRule(0.1, keeps_order=True), 2)
    assert keeping == Outcome(0.5, 6 / 8, (10 + 20 + 100) / 200)


def test_ranks_of_synthetic_paths_settle_gradually_and_are_drawn_from_the_seed():
    paths = synthetic_paths(100)
    np.testing.assert_array_equal(paths.scores[3], synthetic_paths(100).scores[3])
    shares = []
    for layer in (0, 6, 12, 18, 22):
        best = [
            set(replay(path[[layer, layer]], None, 5).ids) & set(replay(path, None, 5).ids) for path in paths.scores
        ]
        shares.append(np.mean([len(one) / 5 for one in best]))
    assert shares == sorted(shares) and shares[0] < 0.4 and shares[-1] > 0.95
