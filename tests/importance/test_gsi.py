"""Greedy removal finds the order of a brute-force search, counts its work, and stays within a memory bound."""

import dataclasses
import inspect

import pytest

from rap_env.errors import MemoryBoundTooSmall
from rap_env.importance.gsi import greedy_sequential_importance
from rap_env.llm.architecture import DecoderLayer
from rap_env.mask import PruningMask
from rap_env.memory.working import working_bytes
from tests.importance.cases import WINDOWS, brute_force, edges, loss_of

RULES = pytest.mark.parametrize("exact", [True, False], ids=["exact", "lazy"])
STREAM_BYTES = 80 * 32 * 4  # 5 windows of 16 tokens, 32 channels in float32


def test_the_order_and_its_losses_equal_a_brute_force_search(llm, ranking):
    order, losses, rounds = brute_force(llm, 8)
    assert list(ranking.order) == order
    assert ranking.losses == pytest.approx(losses, abs=1e-5)
    assert ranking.dense_loss == pytest.approx(loss_of(llm, []), abs=1e-5)
    increases = {name: loss - loss_of(llm, []) for name, loss in rounds[0].items()}
    assert ranking.increases == pytest.approx(increases, abs=1e-5)


def test_a_full_ranking_of_eight_components_takes_36_trials(ranking):
    assert ranking.evaluations == 8 * 9 // 2 == 36
    assert ranking.tokens == 36 * 5 * 16
    assert sorted(ranking.order) == sorted(f"layer{i}.{kind}" for i in range(4) for kind in ("attention", "mlp"))
    assert len(ranking.losses) == 8


def test_what_is_known_are_the_losses_on_all_windows(llm, ranking, lazy):
    assert len(ranking.known) == 37 and len(lazy.known) < 37  # the dense model and 36 trials
    for known in (ranking, lazy):
        mask = PruningMask.all_kept(llm.shape)
        assert known.known[mask] == known.dense_loss
        for name, loss in zip(known.order, known.losses, strict=True):
            mask = mask.drop(name)
            assert known.known[mask] == loss
        for mask, loss in known.known.items():
            assert loss == pytest.approx(loss_of(llm, [component.name for component in mask.dropped]), abs=1e-5)


def test_the_lazy_rule_is_the_default(llm, lazy):
    assert inspect.signature(greedy_sequential_importance).parameters["exact"].default is False
    assert lazy == greedy_sequential_importance(llm, WINDOWS, exact=False)


def test_trials_of_a_round_share_what_lies_in_front_of_them(llm, ranking):
    mask, n_edges = PruningMask.all_kept(llm.shape), []
    for name in ranking.order:
        n_edges.append(len(edges([mask.drop(component) for component in mask.kept])))
        mask = mask.drop(name)
    # Of 8 trials 7 share a beginning with the next, and what lies behind is 7, 6, ..., 0 long.
    assert n_edges[0] == 7 + 7 * 8 // 2
    assert ranking.component_executions == sum(n_edges)
    assert sum(n_edges) < sum(k * (k - 1) for k in range(1, 9)), "whole forwards run k - 1 in each of k trials"


@RULES
def test_the_executions_are_counted_as_they_happen(llm, monkeypatch, exact):
    calls, run = [], DecoderLayer.run
    monkeypatch.setattr(DecoderLayer, "run", lambda *arguments: calls.append(1) or run(*arguments))
    ranking = greedy_sequential_importance(llm, WINDOWS, exact=exact)
    n_forwards = 1 if exact else 3
    # The dense loss runs all 8 once on each part, and so does the lazy rule's block influence on the sketch.
    assert len(calls) - 8 * n_forwards == ranking.component_executions
    assert ranking.seconds > 0


def test_after_some_removals_the_rest_is_ranked_by_the_last_rounds_trials(llm, ranking):
    order, losses, rounds = brute_force(llm, 3)
    partial = greedy_sequential_importance(llm, WINDOWS, removals=3, exact=True)
    last = {name: loss for name, loss in rounds[-1].items() if name not in order}
    assert partial.order == (*order, *sorted(last, key=last.get))
    assert partial.order[:3] == ranking.order[:3]
    assert partial.losses == pytest.approx(losses, abs=1e-5)
    assert partial.losses == ranking.losses[:3]
    assert partial.increases == ranking.increases
    assert partial.evaluations == 8 + 7 + 6


@pytest.mark.parametrize(("removals", "evaluations"), [(0, 0), (1, 8), (8, 36), (100, 36)])
def test_removals_beyond_the_model_stop_at_its_end(llm, removals, evaluations):
    ranking = greedy_sequential_importance(llm, WINDOWS, removals=removals, exact=True)
    assert ranking.evaluations == evaluations
    assert len(set(ranking.order)) == 8 and len(ranking.losses) == min(removals, 8)
    assert len(ranking.increases) == (8 if removals else 0)


@RULES
def test_progress_is_reported_after_each_round(llm, exact):
    reports = []
    greedy_sequential_importance(
        llm, WINDOWS, removals=3, exact=exact, progress=lambda done, total: reports.append((done, total))
    )
    assert reports == [(1, 3), (2, 3), (3, 3)]


@RULES
def test_ranking_leaves_the_model_as_it_was(llm, exact):
    with llm.pruned(PruningMask.all_kept(llm.shape).drop("layer0.mlp")):
        mask = llm.mask
        under_a_mask = greedy_sequential_importance(llm, WINDOWS, removals=2, exact=exact)
        assert llm.mask == mask
    assert under_a_mask == greedy_sequential_importance(llm, WINDOWS, removals=2, exact=exact)  # always from the dense


def test_rankings_are_compared_without_what_they_cost(ranking):
    for cost in ("seconds", "component_executions", "peak_bytes"):
        assert dataclasses.replace(ranking, **{cost: getattr(ranking, cost) + 1}) == ranking
    assert dataclasses.replace(ranking, dense_loss=ranking.dense_loss + 1) != ranking
    assert dataclasses.replace(ranking, increases=dict.fromkeys(ranking.order, 0.0)) != ranking


@pytest.mark.parametrize("fewer_streams", [1, 5, 8])
def test_a_memory_bound_changes_the_cost_and_nothing_else(llm, lazy, fewer_streams):
    memory_bytes = lazy.peak_bytes - fewer_streams * STREAM_BYTES
    bounded = greedy_sequential_importance(llm, WINDOWS, memory_bytes=memory_bytes)
    assert bounded == lazy, "losses and increases to the bit"
    assert bounded.peak_bytes <= memory_bytes
    assert bounded.component_executions > lazy.component_executions


def test_the_exact_rule_needs_no_more_than_the_tightest_bound_allows(llm, ranking):
    assert greedy_sequential_importance(llm, WINDOWS, exact=True, memory_bytes=ranking.peak_bytes) == ranking
    with pytest.raises(MemoryBoundTooSmall, match="raise it"):
        greedy_sequential_importance(llm, WINDOWS, exact=True, memory_bytes=ranking.peak_bytes - 1)


def test_the_tighter_the_bound_the_more_components_are_run(llm, lazy):
    with pytest.raises(MemoryBoundTooSmall) as refused:
        greedy_sequential_importance(llm, WINDOWS, memory_bytes=0)
    bounds = [refused.value.smallest_bytes, *(lazy.peak_bytes - fewer * STREAM_BYTES for fewer in (7, 5, 0))]
    executions = []
    for memory_bytes in bounds:
        bounded = greedy_sequential_importance(llm, WINDOWS, memory_bytes=memory_bytes)
        assert bounded == lazy and bounded.peak_bytes <= memory_bytes
        executions.append(bounded.component_executions)
    assert executions[0] == max(executions) and executions[-1] == min(executions)  # between them strides may miss
    assert executions[0] > executions[-1] == lazy.component_executions


@RULES
def test_a_bound_above_what_is_needed_is_no_bound(llm, ranking, lazy, exact):
    unbounded = ranking if exact else lazy
    bounded = greedy_sequential_importance(llm, WINDOWS, exact=exact, memory_bytes=2**40)
    assert bounded == unbounded
    assert bounded.component_executions == unbounded.component_executions
    assert bounded.peak_bytes == unbounded.peak_bytes


@RULES
@pytest.mark.parametrize("memory_bytes", [0, 1, 999])
def test_a_bound_below_one_forward_is_refused_before_anything_is_run(llm, exact, memory_bytes, monkeypatch):
    monkeypatch.setattr(DecoderLayer, "run", lambda *_: pytest.fail("something was run"))
    with pytest.raises(MemoryBoundTooSmall, match=str(memory_bytes)):
        greedy_sequential_importance(llm, WINDOWS, exact=exact, memory_bytes=memory_bytes)


def test_the_predicted_peak_grows_with_the_tokens(llm):
    peaks = [
        greedy_sequential_importance(llm, WINDOWS[:n_windows, :n_tokens], removals=0).peak_bytes
        for n_windows, n_tokens in [(1, 8), (1, 16), (2, 16), (5, 16)]
    ]
    assert peaks == sorted(set(peaks))
    assert peaks[-1] >= working_bytes(llm.shape, 80, 9), "the streams in front of 8 components and behind the last"
