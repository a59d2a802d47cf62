"""A text gets the masks of the cluster that it is nearest to, before and after the policy was saved."""

import numpy as np
import pytest

from rap_env.memory.scenario import scenario_grid
from rap_env.policies import RetrievalPolicy, load_policy, retrieval, save_policy
from tests.policies.cases import two_archives

TEXTS = ["fish fish", "bird", "fish bird bird", "neither"]


@pytest.fixture(autouse=True)
def counting_encoder(monkeypatch) -> None:
    """Counts of two words, in the sentence encoder's place."""
    monkeypatch.setattr(
        retrieval, "encode_sentences", lambda texts: np.array([[t.count("fish"), t.count("bird")] for t in texts])
    )


def test_texts_are_served_by_the_nearest_centre(tiny_llm, tmp_path):
    policy = two_archives(tiny_llm.shape)
    for served in (policy, load_policy(save_policy(policy, tmp_path))):
        assert served.nearest(TEXTS).tolist() == [0, 1, 1, 0]
        assert len(served.archives) == 2


def test_without_a_text_the_first_archive_decides(tiny_llm):
    policy = two_archives(tiny_llm.shape)
    grid = scenario_grid(tiny_llm.shape, [(1, 64), (16, 2048)], [0.9, 0.8, 0.7])
    first, second = ([a.decide(s.workload, s.budget_bytes) for s in grid] for a in policy.archives)
    assert [policy.decide(s.workload, s.budget_bytes) for s in grid] == first != second


def test_archives_and_centres_that_do_not_match_are_refused(tiny_llm):
    archives = two_archives(tiny_llm.shape).archives
    with pytest.raises(ValueError, match="expected a centre for each of 1 or more archives; got 3 for 2"):
        RetrievalPolicy(tiny_llm.shape, archives, np.eye(3))
    with pytest.raises(ValueError, match="got 0 for 0"):
        RetrievalPolicy(tiny_llm.shape, [], np.empty((0, 2)))
