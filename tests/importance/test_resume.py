"""With a store a ranking goes on where it was cut off, and no loss is measured twice."""

import pytest

from rap_env.evaluation.store import ResultStore
from rap_env.importance.gsi import greedy_sequential_importance
from rap_env.llm.loading import build_tiny_llm
from tests.importance.cases import WINDOWS, Killed

INFLUENCE = "block influences"
RULES = pytest.mark.parametrize("exact", [True, False], ids=["exact", "lazy"])


def kill_after(rounds: int):
    def progress(done, _total):
        if done == rounds:
            raise Killed

    return progress


def rounds_of(measured) -> list[int]:
    """For each mask that was measured, how many components its round had dropped before."""
    return [len(measurement.dropped) - 1 for measurement in measured if measurement.dropped]


@pytest.mark.parametrize("rounds_before", [1, 5, 8])
def test_an_exact_ranking_that_is_cut_off_measures_only_the_rounds_that_are_left(
    llm, ranking, store, measured, rounds_before
):
    with pytest.raises(Killed):
        greedy_sequential_importance(llm, WINDOWS, exact=True, store=store, progress=kill_after(rounds_before))
    assert rounds_of(measured) == [index for index in range(rounds_before) for _ in range(8 - index)]
    measured.clear()
    resumed = greedy_sequential_importance(llm, WINDOWS, exact=True, store=store)
    assert rounds_of(measured) == [index for index in range(rounds_before, 8) for _ in range(8 - index)]
    assert len(measured) == len(rounds_of(measured)), "the dense loss is known, too"
    assert resumed == ranking
    measured.clear()
    assert greedy_sequential_importance(llm, WINDOWS, exact=True, store=store) == ranking
    assert measured == []


@pytest.mark.parametrize("rounds_before", [1, 4, 8])
def test_a_lazy_ranking_that_is_cut_off_measures_only_what_is_left(llm, lazy, store, measured, rounds_before):
    with pytest.raises(Killed):
        greedy_sequential_importance(llm, WINDOWS, store=store, progress=kill_after(rounds_before))
    n_before = len(measured)
    assert greedy_sequential_importance(llm, WINDOWS, store=store) == lazy
    assert len(set(measured)) == len(measured) == len(store) - 1, "each loss once, and block influence"
    assert (len(measured) > n_before) == (rounds_before < 8)
    measured.clear()
    assert greedy_sequential_importance(llm, WINDOWS) == lazy
    assert len(measured) == len(store) - 1, "no more than without a kill"


@RULES
@pytest.mark.parametrize("n_stored", [0, 3, 12])
def test_an_evaluation_that_could_not_be_stored_is_measured_again(
    llm, ranking, lazy, store, measured, monkeypatch, exact, n_stored
):
    put, puts = ResultStore.put, []

    def put_some(self, identity, result):
        puts.extend([identity] if identity["kind"] != INFLUENCE else [])
        if len(puts) > n_stored:
            raise Killed
        put(self, identity, result)

    monkeypatch.setattr(ResultStore, "put", put_some)
    with pytest.raises(Killed):
        greedy_sequential_importance(llm, WINDOWS, exact=exact, store=store)
    known_influence = 0 if exact or n_stored < 2 else 1  # it follows the dense losses of both parts
    assert len(store) == n_stored + known_influence and len(measured) == n_stored + 1
    stored = measured[:n_stored]
    measured.clear()
    monkeypatch.setattr(ResultStore, "put", put)
    assert greedy_sequential_importance(llm, WINDOWS, exact=exact, store=store) == (ranking if exact else lazy)
    assert not set(stored) & set(measured)
    assert len(stored) + len(measured) == len(store) - (not exact)
    if exact:
        assert len(store) == 1 + 36


@RULES
def test_a_stored_ranking_runs_nothing_and_reports_what_it_cost_then(llm, store, exact):
    first = greedy_sequential_importance(llm, WINDOWS, exact=exact, store=store)
    before = llm.site_executions
    again = greedy_sequential_importance(llm, WINDOWS, exact=exact, store=store)
    assert llm.site_executions == before
    assert again == first
    assert (again.tokens, again.seconds) == (first.tokens, first.seconds)


@RULES
def test_without_a_store_every_call_measures_everything(llm, measured, exact):
    greedy_sequential_importance(llm, WINDOWS, removals=2, exact=exact)
    first = list(measured)
    greedy_sequential_importance(llm, WINDOWS, removals=2, exact=exact)
    assert measured == 2 * first
    if exact:
        assert rounds_of(first) == [0] * 8 + [1] * 7


@RULES
def test_the_store_keeps_other_windows_and_other_models_apart(llm, store, measured, exact):
    other = build_tiny_llm("llama", seed=4)
    changed = WINDOWS.clone()
    changed[:, 15] += 1
    cases = [(llm, WINDOWS), (llm, changed), (llm, WINDOWS[:, :8]), (other, WINDOWS)]
    for model, windows in cases:
        stored = greedy_sequential_importance(model, windows, removals=1, exact=exact, store=store)
        assert stored == greedy_sequential_importance(model, windows, removals=1, exact=exact)
    n_influences = 0 if exact else len(cases)
    assert len(store) - n_influences == len(measured) / 2  # half of them for the store, half without it
    if exact:
        assert len(store) == 4 * (1 + 8)


def test_rules_share_stored_evaluations_where_they_look_at_the_same_windows(llm, store, measured):
    one_window = WINDOWS[:1]  # the lazy rule cannot split it
    exact = greedy_sequential_importance(llm, one_window, exact=True, store=store)
    measured.clear()
    lazy = greedy_sequential_importance(llm, one_window, store=store)
    assert measured == [] or lazy.order != exact.order
    assert lazy.dense_loss == exact.dense_loss
    assert len(lazy.increases.items() & exact.increases.items()) >= 4, "all that it looked at"
