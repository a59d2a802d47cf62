"""Score paths of a collection's queries, recorded by the command."""

import numpy as np
import pytest

from experiments import selection_paths
from rap_env.llm.loading import build_tiny_llm
from rap_env.rerank import SMOLLM2, Reranker
from rap_env.rerank.paths import ScorePaths
from tests.experiments.rerank_training.conftest import collection, folder  # noqa: F401


def test_paths_are_the_reranker_s_scores_of_bm25_s_best_with_their_grades(folder, collection, tmp_path, monkeypatch):  # noqa: F811
    reranker = Reranker(build_tiny_llm(), SMOLLM2, max_document_tokens=40)
    monkeypatch.setattr(selection_paths.Reranker, "load", lambda **options: reranker)
    monkeypatch.setattr("sys.argv", ["selection_paths"])
    selection_paths.main([str(folder), str(tmp_path / "paths.npz"), "--candidates", "4"])
    paths = ScorePaths.load(tmp_path / "paths.npz")
    assert list(paths.queries) == list(collection.queries) and paths.provenance["candidates"] == 4
    first = next(selection_paths.requests_of(collection, 4))
    assert np.allclose(paths.scores[0], reranker.score_path(first.query, first.documents))
    assert np.array_equal(paths.grades[0], first.grades, equal_nan=True) and np.nanmax(paths.grades[0]) > 0
    with pytest.raises(SystemExit):
        selection_paths.main([str(folder), str(tmp_path / "paths.npz")])
