"""Every agent in conf/agent keeps the one contract; searches that are killed are resumed by running them again."""

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from agents.base import ArchiveAgent, Case, Evaluated
from agents.driver import evaluated_masks, run_search
from rap_env.errors import SearchExhausted
from rap_env.evaluation.meter import TokenBudget
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.evaluation.store import ResultStore
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from rap_env.policies import load_policy, save_policy
from rap_env.problem import PruningProblem
from tests.agents.cases import (
    WITHOUT_LIMIT,
    Expensive,
    LastIsLeast,
    build_agent,
    decided,
    fits,
    make_task,
    own_agents,
)
from tests.conftest import TOY_WINDOWS

ANSWERS = {
    f"family_{name}" for name in ("surrogate_short", "gradient", "noise", "ppo", "sac", "td3", "dqn", "maskable_ppo")
}
AGENTS = [  # what is made of the same search in other ways: tests/agents/test_family_answers.py
    name
    for name in own_agents()
    if name != "flap" and name not in ANSWERS  # it needs parts: test_widths.py
]
UNRANKED = {"dense", "random", "random_search", "evop_from_random", "evop_layers", "evopress_paper"}
UNRANKED |= {"uniform", "uniform_mlp", "evopress_uniform", "evopress_uniform_filled", "cma"}
SEARCHES = [
    name for name in AGENTS if name.startswith(("random_search", "archive", "surrogate", "evop", "cma", "family"))
]
FEW = {"workloads": [(1, 512), (16, 2048)], "ratios": [0.9, 0.75]}  # scenarios of `toy_task`
BY_BATCHES = {"random_search", "archive", "archive_filled", "surrogate"}  # they end only with their tokens
BY_CURVES = {"single_site_greedy", "milp_on_search", "evopress_single_sites", "family_surrogate"}  # of the search half
AS_FAR_AS_PAID = {"greedy_per_byte", "greedy_layers"}  # they rank workloads, or layers, until their tokens end


class Killed(Exception):
    """Cuts a search off where a kill would."""


class KillingStore(ResultStore):
    """Counts what is measured; dies when it is to keep more than `lives` results."""

    def __init__(self, location: Path, lives: int) -> None:
        super().__init__(location)
        self.lives, self.kept = lives, 0

    def put(self, identity, result) -> None:
        if self.kept == self.lives:
            self.die()
        super().put(identity, result)
        self.kept += 1

    def die(self) -> None:
        raise Killed


class SuicidalStore(KillingStore):
    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(autouse=True)
def few_predictions(monkeypatch):
    monkeypatch.setattr("agents.surrogate._PREDICTED", 8)


@functools.cache
def tokens_to_begin(name: str) -> int:
    """Tokens that an agent spends before it searches, as a rule on the ranking."""
    task = make_task(build_tiny_llm(), order=None, **FEW)
    build_agent(name).begin(task)
    return task.problem.budget.spent


@pytest.mark.parametrize(("evaluations", "in_flight"), [(1, 1), (3, 3), (8, 1), (8, 3)])
@pytest.mark.parametrize("name", AGENTS)
def test_search_ends_as_a_sound_policy_within_its_tokens(name, evaluations, in_flight, toy_task, tmp_path):
    begin = tokens_to_begin(name)
    task, twin = toy_task(begin + evaluations), toy_task(begin + evaluations)
    result, again = (run_search(build_agent(name), each, in_flight) for each in (task, twin))
    assert result.tokens == task.problem.budget.spent
    assert result.evaluations == task.problem.evaluator.calls
    searched = result.evaluations - (begin if name in BY_CURVES else 0)
    assert result.tokens == begin + searched, "the toy's evaluations cost a token each"
    assert searched <= (evaluations if name in SEARCHES else 0)
    assert searched > 0 or name not in SEARCHES
    assert searched == evaluations or name not in BY_BATCHES
    assert not task.problem.llm.mask.dropped, "the model is dense again"
    masks = decided(result.policy, task.scenarios)
    assert name == "dense" or all(
        fits(mask, task.problem.shape, scenario) for mask, scenario in zip(masks, task.scenarios, strict=True)
    )
    read = load_policy(save_policy(result.policy, tmp_path / "policy"))
    assert read.parameters() == result.policy.parameters() == again.policy.parameters()
    assert decided(read, task.scenarios) == masks


@pytest.mark.parametrize("name", AGENTS)
def test_only_what_needs_the_ranking_pays_for_it(name, toy_task):
    begin = tokens_to_begin(name)
    assert (begin == 0) == (name in UNRANKED)
    if begin and name not in AS_FAR_AS_PAID:
        task = toy_task(begin - 1)
        with pytest.raises(SearchExhausted, match="tokens are spent"):
            run_search(build_agent(name), task)
        assert task.problem.budget.spent < begin
    task = toy_task(begin)
    result = run_search(build_agent(name), task)
    assert (result.tokens, result.evaluations) == (begin, begin if name in BY_CURVES else 0)
    assert len(decided(result.policy, task.scenarios)) == 4


def test_greedy_per_byte_ranks_for_the_workloads_that_are_paid_for_and_needs_one(toy_task):
    whole = toy_task(WITHOUT_LIMIT)
    run_search(build_agent("greedy_per_byte"), whole)
    short, none = toy_task(whole.problem.budget.spent - 1), toy_task(100)
    policy = run_search(build_agent("greedy_per_byte"), short).policy
    assert len(policy.parameters()["orders"]) == 1, "of two workloads"
    with pytest.raises(SearchExhausted, match="tokens are spent"):
        run_search(build_agent("greedy_per_byte"), none)


@pytest.mark.parametrize("name", SEARCHES)
def test_seed_decides_a_search(name, tiny_llm):
    tasks = [make_task(tiny_llm, 16, seed=seed, **FEW) for seed in (0, 0, 1)]
    first, second, other = (run_search(build_agent(name), task) for task in tasks)
    assert first.policy.parameters() == second.policy.parameters()
    assert (first.tokens, first.evaluations, first.details) == (second.tokens, second.evaluations, second.details)
    by_start = name.endswith(("layers", "equal_counts")) or name == "evop"  # few masks; all of them are found
    assert by_start or other.policy.parameters() != first.policy.parameters()


def search_with(llm, name: str, store: ResultStore):
    """A search that pays for its ranking, and for 12 expensive evaluations or as many cheap ones as they are worth."""
    task = make_task(llm, tokens_to_begin(name) + 12 * 320, Expensive(), None, store=store, **FEW)
    return run_search(build_agent(name), task), task


@pytest.mark.parametrize("name", sorted({*AGENTS} - {"dense", "random"}))
def test_a_killed_search_that_runs_again_measures_nothing_twice(name, tiny_llm, tmp_path):
    whole_store = KillingStore(tmp_path / "whole.db", lives=-1)
    whole, _task = search_with(tiny_llm, name, whole_store)
    lives = whole_store.kept * 2 // 3
    killed, again = KillingStore(tmp_path / "killed.db", lives), KillingStore(tmp_path / "killed.db", lives=-1)
    if lives:
        with pytest.raises(Killed):
            search_with(tiny_llm, name, killed)
    result, _task = search_with(tiny_llm, name, again)
    assert killed.kept + again.kept == whole_store.kept and killed.kept == lives
    assert result == replace(whole, policy=result.policy)
    assert result.policy.parameters() == whole.policy.parameters()


def test_a_search_whose_process_was_killed_is_resumed_by_another(tiny_llm, tmp_path):
    script = (
        "from tests.agents.test_driver import *;"
        f" search_with(build_tiny_llm(), 'surrogate', SuicidalStore(Path({str(tmp_path / 'killed.db')!r}), 20))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    whole_store = KillingStore(tmp_path / "whole.db", lives=-1)
    whole, _task = search_with(tiny_llm, "surrogate", whole_store)
    again = KillingStore(tmp_path / "killed.db", lives=-1)
    result, _task = search_with(tiny_llm, "surrogate", again)
    assert again.kept == whole_store.kept - 20
    assert result.policy.parameters() == whole.policy.parameters()


class Scripted(ArchiveAgent):
    """Proposes batches of masks that each drop the first so many components."""

    ranked = False

    def __init__(self, *batches: Sequence[int]) -> None:
        self.batches, self.calls = list(batches), []

    def ask(self, n: int) -> list[Case]:
        self.calls.append(n)
        dense = PruningMask.all_kept(self.task.problem.shape)
        batch = self.batches.pop(0) if self.batches else []
        return [Case(dense.drop(*dense.components[:dropped]), self.task.scenarios[0]) for dropped in batch]

    def tell(self, evaluated: Sequence[Evaluated]) -> None:
        self.calls.append([len(one.mask.dropped) for one in evaluated])


def test_driver_leaves_out_what_the_tokens_do_not_pay_for(tiny_llm):
    agent, task = Scripted([1, 2], [2, 3, 4, 1, 5], [6]), make_task(tiny_llm, 3)
    result = run_search(agent, task)
    assert agent.calls == [3, [1, 2], 1, [2, 3, 1]]
    assert [(len(mask.dropped), tokens) for mask, tokens in evaluated_masks(task)] == [(1, 1), (2, 2), (3, 3)]
    assert (result.tokens, result.evaluations) == (3, 3)


def test_driver_asks_for_several_batches_before_it_tells_the_first(tiny_llm):
    agent = Scripted([1], [2, 3], [4])
    run_search(agent, make_task(tiny_llm, 9), in_flight=2)
    assert agent.calls == [9, 8, [1], 6, [2, 3], 5, [4], 5]


def test_driver_ends_a_search_that_proposes_nothing_new(tiny_llm):
    agent = Scripted(*[[1]] * 1000)
    assert run_search(agent, make_task(tiny_llm, 9)).evaluations == 1
    assert len(agent.calls) < 150


def test_driver_logs_the_best_reward_over_the_scenarios_and_archives_what_fits(tiny_llm):
    log, progress = [], []
    agent = Scripted([8], [7, 0])
    task = make_task(tiny_llm, 9, log=lambda *entry: log.append(entry), progress=lambda *entry: progress.append(entry))
    run_search(agent, task)
    dense = PruningMask.all_kept(tiny_llm.shape)
    assert {len(mask.dropped): reward for mask, reward in task.archive.items()} == pytest.approx({8: 0.0, 7: 1 / 36})
    assert dense not in task.archive, "it does not fit"
    # Dense needs 10 / 9 of the memory: the penalty is 5 times an overshoot of 1 / 9.
    rewards = (1 / 36 + 1.0 - 5 / 9) / 2
    assert log == [
        (1, {"reward": 0.0, "best_reward": 0.0}),
        (3, {"reward": pytest.approx(rewards, abs=1e-3), "best_reward": pytest.approx(1 / 36)}),
    ]
    assert progress == [(1, 9), (3, 9)]


def test_archive_holds_rewards_not_scores(tiny_llm):
    weights = {"accuracy": 0.5, "smooth_accuracy": 0.25}
    problem = PruningProblem(tiny_llm, LastIsLeast(), reward_weights=weights, budget=TokenBudget(9))
    task = replace(make_task(tiny_llm), problem=problem)
    run_search(Scripted([7]), task)
    assert list(task.archive.values()) == pytest.approx([0.75 / 36])


def test_a_search_without_a_limit_or_without_batches_is_refused(tiny_llm, toy_problem):
    with pytest.raises(ValueError, match="expected a token budget with a limit and in_flight of at least 1; got 0"):
        run_search(Scripted(), make_task(tiny_llm), in_flight=0)
    with pytest.raises(ValueError, match="expected a token budget with a limit"):
        run_search(Scripted(), replace(make_task(tiny_llm), problem=toy_problem))


@pytest.mark.parametrize("exact", [True, False])
def test_what_the_ranking_measured_on_the_searched_text_is_known_to_every_archive(exact, toy_task):
    same, other = PerplexityEvaluator(TOY_WINDOWS, "search"), PerplexityEvaluator(TOY_WINDOWS + 1, "search")
    task = toy_task(WITHOUT_LIMIT, evaluator=same, exact=exact)
    assert not task.archive
    known = task.ranking.known
    assert task.archive.keys() == known.keys() and len(known) > 8
    assert task.archive == pytest.approx({mask: -loss for mask, loss in known.items()})
    free = task.problem.with_budget()
    assert all(
        free.meter.evaluate([mask])[0].score == pytest.approx(score, abs=1e-6) for mask, score in task.archive.items()
    )
    spent = task.problem.budget.spent
    agent = build_agent("evop")
    agent.begin(task)
    assert task.problem.budget.spent == spent
    for evaluator in (other, LastIsLeast()):
        task = toy_task(WITHOUT_LIMIT, evaluator=evaluator, exact=exact)
        assert task.ranking.known == known and not task.archive


def test_searches_start_from_the_scores_that_the_ranking_measured(toy_task):
    """With no token left after the ranking its masks still are the policy's."""
    spent = {}
    for name in ("archive", "surrogate", "evop", "evopress"):
        task = toy_task(WITHOUT_LIMIT, evaluator=PerplexityEvaluator(TOY_WINDOWS, "search"))
        limit = spent.setdefault(name, task.ranking.tokens)
        task = toy_task(limit, evaluator=PerplexityEvaluator(TOY_WINDOWS, "search"))
        policy = run_search(build_agent(name), task).policy
        best = [max(s for m, s in task.archive.items() if fits(m, policy.shape, case)) for case in task.scenarios]
        assert [task.archive[mask] for mask in decided(policy, task.scenarios)] == best


def test_a_replaced_task_has_an_archive_of_its_own(tiny_llm):
    task = make_task(tiny_llm, 3)
    run_search(Scripted([8]), task)
    assert task.archive and not replace(task, seed=1).archive
