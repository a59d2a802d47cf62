"""Greedy removal finds the order of a brute-force search, counts its work, and goes on where it was cut off."""

import dataclasses

import pytest
import torch

from rap_env.evaluation.store import ResultStore
from rap_env.importance.gsi import RemovalMeter, greedy_sequential_importance
from rap_env.importance.source import ImportanceSource
from rap_env.llm.architecture import DecoderLayer
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask

WINDOWS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def loss_of(llm, names) -> float:
    """Calibration loss without the named components, by one whole forward of the switched model."""
    with llm.pruned(PruningMask.all_kept(llm.shape).drop(*names)):
        logprobs = llm.model(WINDOWS, use_cache=False).logits.double().log_softmax(-1)
    losses = [-logprobs[row, t - 1, WINDOWS[row, t]].item() for row in range(2) for t in range(1, 16)]
    return sum(losses) / len(losses)


def brute_force(llm, removals: int) -> tuple[list[str], list[float], list[dict[str, float]]]:
    """The rule as the paper states it: try all that are left, each by whole forwards; remove the least harmful."""
    removed, losses, rounds = [], [], []
    for _ in range(removals):
        left = [c.name for c in llm.shape.components if c.name not in removed]
        trials = {name: loss_of(llm, [*removed, name]) for name in left}
        removed.append(min(trials, key=trials.get))
        losses.append(trials[removed[-1]])
        rounds.append(trials)
    return removed, losses, rounds


@pytest.fixture(scope="module", params=["llama", "opt"])
def llm(request):
    return build_tiny_llm(request.param, seed=3)


@pytest.fixture(scope="module")
def ranking(llm):
    return greedy_sequential_importance(llm, WINDOWS)


@pytest.fixture
def store(tmp_path):
    with ResultStore(tmp_path / "results.db") as store:
        yield store


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """Trials that are really measured, each as the number of components that its round has dropped before."""
    calls, measure = [], RemovalMeter._measure

    def record(self, mask, component):
        if component is not None:
            calls.append(len(mask.dropped))
        return measure(self, mask, component)

    monkeypatch.setattr(RemovalMeter, "_measure", record)
    return calls


def test_the_order_and_its_losses_equal_a_brute_force_search(llm, ranking):
    order, losses, _rounds = brute_force(llm, 8)
    assert list(ranking.order) == order
    assert ranking.losses == pytest.approx(losses, abs=1e-5)
    assert ranking.dense_loss == pytest.approx(loss_of(llm, []), abs=1e-5)


def test_trials_equal_whole_forwards_of_the_shrunk_model(llm):
    dropped = ["layer0.attention", "layer2.mlp"]
    meter = RemovalMeter(llm, WINDOWS)
    trials = meter.trials(PruningMask.all_kept(llm.shape).drop(*dropped))
    expected = {
        c.name: pytest.approx(loss_of(llm, [*dropped, c.name]), abs=1e-5)
        for c in llm.shape.components
        if c.name not in dropped
    }
    assert {name: trial.loss for name, trial in trials.items()} == expected
    # Trial j runs what lies behind it (5, 4, ..., 0) and all but the first advance the stream by one.
    assert [trial.component_executions for trial in trials.values()] == [5, 5, 4, 3, 2, 1]
    assert meter.tokens_per_trial == 32


def test_a_loss_of_a_mask_equals_a_whole_forward(llm):
    mask = PruningMask.all_kept(llm.shape).drop("layer1.attention")
    assert RemovalMeter(llm, WINDOWS).trial(mask).loss == pytest.approx(loss_of(llm, ["layer1.attention"]), abs=1e-5)


def test_a_full_ranking_of_eight_components_takes_36_trials(ranking):
    assert ranking.evaluations == 8 * 9 // 2 == 36
    assert ranking.tokens == 36 * 2 * 16
    assert sorted(ranking.order) == sorted(f"layer{i}.{kind}" for i in range(4) for kind in ("attention", "mlp"))
    assert len(ranking.losses) == 8


def test_the_streams_in_front_of_a_trial_are_not_run_again(llm, ranking):
    # Whole forwards run k - 1 components in each of a round's k trials.
    assert ranking.component_executions < sum(k * (k - 1) for k in range(1, 9))
    # The first round advances the stream 7 times and runs what lies behind each of 8 trials.
    first = greedy_sequential_importance(llm, WINDOWS, removals=1)
    assert first.component_executions == 7 * 8 // 2


def test_the_executions_are_counted_as_they_happen(llm, monkeypatch):
    calls, run = [], DecoderLayer.run
    monkeypatch.setattr(DecoderLayer, "run", lambda *arguments: calls.append(1) or run(*arguments))
    ranking = greedy_sequential_importance(llm, WINDOWS)
    assert len(calls) - 8 == ranking.component_executions  # the dense loss runs all 8 once


def test_the_lazy_rule_equals_the_exact_one_where_importance_only_grows(llm, monkeypatch):
    # Losses by a rule: a component costs more, the more others are gone, and never less than before.
    weights = {component.name: float(position + 1) for position, component in enumerate(llm.shape.components)}

    def measure(self, mask, component):
        gone = mask.dropped if component is None else (*mask.dropped, component)
        return {"loss": sum(weights[c.name] for c in gone) * len(gone), "component_executions": 0, "seconds": 0.0}

    monkeypatch.setattr(RemovalMeter, "_measure", measure)
    exact = greedy_sequential_importance(llm, WINDOWS, exact=True)
    lazy = greedy_sequential_importance(llm, WINDOWS, exact=False)
    assert lazy.order == exact.order == tuple(weights)
    assert lazy.losses == exact.losses
    assert lazy.evaluations < exact.evaluations


def test_every_lazy_loss_is_the_loss_of_the_shrunk_model(llm):
    lazy = greedy_sequential_importance(llm, WINDOWS, exact=False)
    assert lazy.losses == pytest.approx([loss_of(llm, lazy.order[: k + 1]) for k in range(8)], abs=1e-5)
    assert lazy.evaluations <= 36


def test_after_some_removals_the_rest_is_ranked_by_the_last_rounds_trials(llm, ranking):
    order, losses, rounds = brute_force(llm, 3)
    partial = greedy_sequential_importance(llm, WINDOWS, removals=3)
    last = {name: loss for name, loss in rounds[-1].items() if name not in order}
    assert partial.order == (*order, *sorted(last, key=last.get))
    assert partial.order[:3] == ranking.order[:3]
    assert partial.losses == pytest.approx(losses, abs=1e-5)
    assert partial.evaluations == 8 + 7 + 6


@pytest.mark.parametrize(("removals", "evaluations"), [(0, 0), (1, 8), (8, 36), (100, 36)])
def test_removals_beyond_the_model_stop_at_its_end(llm, removals, evaluations):
    ranking = greedy_sequential_importance(llm, WINDOWS, removals=removals)
    assert ranking.evaluations == evaluations
    assert len(set(ranking.order)) == 8 and len(ranking.losses) == min(removals, 8)


def test_progress_is_reported_after_each_round(llm):
    reports = []
    greedy_sequential_importance(llm, WINDOWS, removals=3, progress=lambda done, total: reports.append((done, total)))
    assert reports == [(1, 3), (2, 3), (3, 3)]


class Killed(Exception):
    pass


@pytest.mark.parametrize("rounds_before", [1, 5, 8])
def test_a_ranking_that_is_cut_off_measures_only_the_rounds_that_are_left(llm, ranking, store, measured, rounds_before):
    def kill(done, _total):
        if done == rounds_before:
            raise Killed

    with pytest.raises(Killed):
        greedy_sequential_importance(llm, WINDOWS, store=store, progress=kill)
    assert measured == [index for index in range(rounds_before) for _ in range(8 - index)]
    measured.clear()
    resumed = greedy_sequential_importance(llm, WINDOWS, store=store)
    assert measured == [index for index in range(rounds_before, 8) for _ in range(8 - index)]
    assert resumed == ranking
    measured.clear()
    assert greedy_sequential_importance(llm, WINDOWS, store=store) == ranking
    assert measured == []


def test_a_trial_that_could_not_be_stored_is_measured_again(llm, ranking, store, measured, monkeypatch):
    put, puts = ResultStore.put, []

    def put_three(self, identity, result):
        puts.append(identity)
        if len(puts) > 3:
            raise Killed
        put(self, identity, result)

    monkeypatch.setattr(ResultStore, "put", put_three)
    with pytest.raises(Killed):
        greedy_sequential_importance(llm, WINDOWS, store=store)
    assert len(store) == 3  # the dense loss and two trials
    measured.clear()
    monkeypatch.setattr(ResultStore, "put", put)
    assert greedy_sequential_importance(llm, WINDOWS, store=store) == ranking
    assert len(measured) == 36 - 2


def test_without_a_store_every_call_measures_everything(llm, measured):
    for _ in range(2):
        greedy_sequential_importance(llm, WINDOWS, removals=2)
    assert measured == 2 * ([0] * 8 + [1] * 7)


def test_the_store_keeps_other_windows_and_other_models_apart(llm, store, measured):
    other = build_tiny_llm("llama", seed=4)
    changed = WINDOWS.clone()
    changed[1, 15] += 1
    for model, windows in [(llm, WINDOWS), (llm, changed), (llm, WINDOWS[:, :8]), (other, WINDOWS)]:
        stored = greedy_sequential_importance(model, windows, removals=1, store=store)
        assert stored == greedy_sequential_importance(model, windows, removals=1)
    assert measured == 8 * [0] * 8  # half of them for the store, half without it
    assert len(store) == 4 * (1 + 8)


def test_ranking_leaves_the_model_as_it_was(llm):
    with llm.pruned(PruningMask.all_kept(llm.shape).drop("layer0.mlp")):
        mask = llm.mask
        under_a_mask = greedy_sequential_importance(llm, WINDOWS, removals=1)
        assert llm.mask == mask
    assert under_a_mask == greedy_sequential_importance(llm, WINDOWS, removals=1)  # always from the dense model


def test_rankings_are_compared_without_their_time(ranking):
    assert dataclasses.replace(ranking, seconds=ranking.seconds + 1) == ranking
    assert dataclasses.replace(ranking, dense_loss=ranking.dense_loss + 1) != ranking


def test_the_current_order_is_dropped_components_first_then_by_their_trials(llm, ranking):
    source = ImportanceSource(ranking.order, RemovalMeter(llm, WINDOWS))
    dropped = [ranking.order[4], ranking.order[1]]
    mask = PruningMask.all_kept(llm.shape).drop(*dropped)
    losses = {c.name: loss_of(llm, [*dropped, c.name]) for c in mask.kept}
    expected = (ranking.order[1], ranking.order[4], *sorted(losses, key=losses.get))
    assert source.current(mask) == expected
    assert source.static == ranking.order
    assert source.loss_after(mask, expected[2]) == pytest.approx(losses[expected[2]], abs=1e-5)
    assert source.loss(mask) == pytest.approx(loss_of(llm, dropped), abs=1e-5)


def test_measuring_without_a_meter_is_refused(llm, ranking):
    source, dense = ImportanceSource(ranking.order), PruningMask.all_kept(llm.shape)
    for measure in (source.current, source.loss, lambda mask: source.loss_after(mask, "layer0.mlp")):
        with pytest.raises(ValueError, match="give the ImportanceSource a RemovalMeter"):
            measure(dense)
