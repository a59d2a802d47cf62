"""Each cluster of the search text gets a search of its own, and they spend together what one search would."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from agents import by_cluster
from agents.base import Task
from agents.evop import EvopAgent
from experiments.judged import judge
from rap_env.errors import CorpusUnavailable, EvaluationFailed
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.importance.source import ImportanceSource
from rap_env.policies import ArchivePolicy, retrieval
from rap_env.problem import EvaluationBudget, PruningProblem
from tests.agents.test_evolution import grid_of

TOKENS = 12
LOSS = {"accuracy": 1.0, "overshoot": -5.0}


def windows_of(llm, *letters: str) -> torch.Tensor:
    """A window each, of small and capital copies of one letter in random order."""
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice([letter, letter.upper()], TOKENS)) for letter in letters]
    return torch.tensor([llm.tokenizer.encode(text) for text in texts])


@pytest.fixture(autouse=True)
def counting_encoder(monkeypatch) -> None:
    """How often a text has each of three letters, in the sentence encoder's place."""

    def encode(texts) -> np.ndarray:
        return np.array([[text.lower().count(letter) / TOKENS for letter in "abc"] for text in texts])

    monkeypatch.setattr(by_cluster, "encode_sentences", encode)
    monkeypatch.setattr(retrieval, "encode_sentences", encode)


@pytest.fixture
def task(tiny_llm, toy_sampler, tmp_path) -> Task:
    evaluator = PerplexityEvaluator(windows_of(tiny_llm, "a", "b", "b", "b", "c", "c"), "letters")
    problem = PruningProblem(tiny_llm, evaluator, reward_weights=LOSS, budget=EvaluationBudget(12))
    order = [component.name for component in tiny_llm.shape.components]
    return Task(problem, ImportanceSource(order), toy_sampler, grid_of(tiny_llm), evaluator.windows, 0, tmp_path)


AGENT = EvopAgent(population=4, generations=3, n_clusters=3)


def test_the_largest_cluster_comes_first_and_texts_go_to_their_own(task):
    result = AGENT.search(task)
    assert result.details == {"windows_of_clusters": [3, 2, 1]}
    assert result.policy.nearest(["bbbB", "cC", "Aa", "bbc"]).tolist() == [0, 1, 2, 0]


def test_every_cluster_has_the_masks_that_a_search_on_it_alone_finds(task):
    policy = AGENT.search(task).policy
    for archive, members in zip(policy.archives, ([1, 2, 3], [4, 5], [0]), strict=True):
        problem = task.problem.judged_by(task.problem.evaluator.part(members), EvaluationBudget(12))
        alone = EvopAgent(population=4, generations=3).search(replace(task, problem=problem)).policy
        assert isinstance(archive, ArchivePolicy) and archive.parameters() == alone.parameters()
    assert len({str(archive.parameters()) for archive in policy.archives}) == 3


def test_all_clusters_together_forward_the_tokens_of_one_search(task):
    problem = task.problem.judged_by(task.problem.evaluator, EvaluationBudget(2))
    result = AGENT.search(replace(task, problem=problem, grid=task.grid[:1]))
    assert problem.budget.spent == result.evaluations == 0
    assert result.calibration_tokens == 2 * 6 * TOKENS


def test_progress_and_log_run_on_from_cluster_to_cluster(task):
    done, steps = [], []
    AGENT.search(replace(task, progress=lambda *now: done.append(now), log=lambda step, metrics: steps.append(step)))
    assert done == sorted(done) and 24 < done[-1][0] <= 36 and {total for _done, total in done} == {36}
    assert steps == sorted(steps) and 24 < steps[-1] <= 3 * 12


def test_judging_by_text_is_judging_every_window_under_the_mask_that_it_retrieves(task):
    policy = AGENT.search(task).policy
    reported = windows_of(task.problem.llm, "c", "b", "b", "a", "c", "b", "b")
    problem = PruningProblem(task.problem.llm, PerplexityEvaluator(reported, "more letters"), reward_weights=LOSS)
    rows = judge({"evop": policy}, problem, task.grid)
    for row, scenario in zip(rows, task.grid, strict=True):
        losses = []
        for window, archive in zip(reported, (1, 0, 0, 2, 1, 0, 0), strict=True):
            alone = problem.judged_by(PerplexityEvaluator(window[None], "one"))
            mask = policy.archives[archive].decide(scenario.workload, scenario.budget_bytes)
            losses.append(-alone.evaluate(mask, scenario.workload, scenario.budget_bytes).score)
        assert row["score"] == pytest.approx(-np.mean(losses)) == pytest.approx(row["reward"])
        (of_text,) = row["tasks"].values()
        assert of_text["items"] == 7 and of_text["perplexity"] == pytest.approx(np.exp(np.mean(losses)))
        assert not row["violation"] and row["footprint"]["peak_bytes"] <= row["budget_bytes"]
        assert [n for n, _dropped in row["routes"]] == [4, 2, 1]
    assert len(rows) == len(task.grid) and {row["policy"] for row in rows} == {"evop"}


def test_judges_that_read_no_text_get_the_first_archives_masks(task, toy_problem):
    policy = AGENT.search(task).policy
    rows = judge({"evop": policy, "first": policy.archives[0]}, toy_problem, task.grid)
    by_policy = [[row["dropped"] for row in rows if row["policy"] == name] for name in ("evop", "first")]
    assert by_policy[0] == by_policy[1] and "routes" not in rows[0]


def test_searches_without_text_or_with_too_few_windows_are_refused(task, toy_problem):
    with pytest.raises(EvaluationFailed, match=r"need a search by text \(evaluation=text\); got CountingEvaluator"):
        AGENT.search(replace(task, problem=toy_problem))
    with pytest.raises(CorpusUnavailable, match="7 clusters need as many windows to search on; got 6"):
        EvopAgent(n_clusters=7).search(task)
    with pytest.raises(ValueError, match="expected at least 1 cluster; got 0"):
        EvopAgent(n_clusters=0)
