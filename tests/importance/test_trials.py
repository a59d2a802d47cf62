"""Trials equal whole forwards of the shrunk model, share streams, and hold no more of them than allowed."""

import random
import weakref

import pytest

from rap_env.importance.trials import MaskStreams, RemovalMeter
from rap_env.llm.architecture import DecoderLayer
from rap_env.mask import PruningMask, by_layer
from tests.importance.cases import WINDOWS, edges, loss_of

HELD = [1, 2, 3, 4, 5, 8, 9, 100]


def random_trials(llm, n: int, seed: int) -> list[tuple[PruningMask, str]]:
    """Masks that grow and shrink, each with one of its kept components."""
    rng, mask, trials = random.Random(seed), PruningMask.all_kept(llm.shape), []
    for _ in range(n):
        name = rng.choice(mask.components).name
        mask = mask.drop(name) if mask.keeps(name) and len(mask.kept) > 1 else mask.restore(name)
        trials.append((mask, rng.choice(mask.kept)))
    return trials


def test_trials_equal_whole_forwards_of_the_shrunk_model(llm):
    dropped = ["layer0.attention", "layer2.mlp"]
    mask, before = PruningMask.all_kept(llm.shape).drop(*dropped), llm.component_executions
    meter = RemovalMeter(llm, WINDOWS)
    trials = meter.trials(mask)
    expected = {c.name: pytest.approx(loss_of(llm, [*dropped, c.name]), abs=1e-5) for c in mask.kept}
    assert {name: trial.loss for name, trial in trials.items()} == expected
    assert list(trials) == [c.name for c in mask.kept]
    # What lies behind each is 5, 4, ..., 0 long, and the stream in front is advanced 5 times.
    n_executions = sum(trial.component_executions for trial in trials.values())
    assert n_executions == 15 + 5 == len(edges([mask.drop(c) for c in mask.kept])) == llm.component_executions - before
    assert meter.tokens_per_trial == 80


def test_one_trial_is_to_the_bit_the_same_among_all_and_alone(llm):
    mask = PruningMask.all_kept(llm.shape).drop("layer1.mlp", "layer3.attention")
    together = RemovalMeter(llm, WINDOWS).trials(mask)
    alone = RemovalMeter(llm, WINDOWS)
    assert {component.name: alone.trial(mask, component) for component in mask.kept} == together
    assert [RemovalMeter(llm, WINDOWS).trial(mask.drop(name)) for name in together] == list(together.values())


def test_a_loss_of_a_mask_equals_a_whole_forward(llm):
    mask = PruningMask.all_kept(llm.shape).drop("layer1.attention")
    assert RemovalMeter(llm, WINDOWS).trial(mask).loss == pytest.approx(loss_of(llm, ["layer1.attention"]), abs=1e-5)


def test_with_everything_dropped_the_embedding_goes_straight_to_the_head(llm):
    names = [component.name for component in llm.shape.components]
    last = PruningMask.all_kept(llm.shape).drop(*names[:-1])
    trials = RemovalMeter(llm, WINDOWS).trials(last)
    assert list(trials) == names[-1:]
    assert trials[names[-1]].loss == pytest.approx(loss_of(llm, names), abs=1e-5)
    assert trials[names[-1]].component_executions == 0
    assert RemovalMeter(llm, WINDOWS).trials(last.drop(names[-1])) == {}


def test_stored_trials_of_a_round_are_left_out_of_the_next_run(llm, store, measured):
    mask = PruningMask.all_kept(llm.shape)
    known = [mask.components[position] for position in (0, 3, 7)]
    RemovalMeter(llm, WINDOWS, store).trial(mask, known[0])
    RemovalMeter(llm, WINDOWS, store).trial(mask.drop(known[1]))  # the same mask by another way
    RemovalMeter(llm, WINDOWS, store).trial(mask.drop(known[0]), known[2])  # not of this round
    measured.clear()
    meter, before = RemovalMeter(llm, WINDOWS, store), llm.component_executions
    trials = meter.trials(mask)
    missing = [component for component in mask.components if component not in known[:2]]
    assert [measurement.dropped for measurement in measured] != []
    assert sorted(measurement.dropped for measurement in measured) == sorted((c.name,) for c in missing)
    assert llm.component_executions - before == len(edges([mask.drop(component) for component in missing]))
    assert trials == RemovalMeter(llm, WINDOWS).trials(mask)


@pytest.mark.parametrize("held_streams", HELD)
def test_losses_do_not_depend_on_how_many_streams_are_held(llm, held_streams):
    bounded, free = RemovalMeter(llm, WINDOWS, held_streams=held_streams), RemovalMeter(llm, WINDOWS)
    for mask, component in random_trials(llm, 12, seed=held_streams):
        assert bounded.trial(mask, component) == free.trial(mask, component)
        assert bounded.trial(mask) == free.trial(mask)
    mask = PruningMask.all_kept(llm.shape)
    assert bounded.trials(mask) == free.trials(mask)


def test_trials_equal_whole_forwards_on_masks_that_grow_and_shrink(llm):
    meter = RemovalMeter(llm, WINDOWS, held_streams=3)
    for mask, component in random_trials(llm, 12, seed=1):
        names = [c.name for c in mask.drop(component).dropped]
        assert meter.trial(mask, component).loss == pytest.approx(loss_of(llm, names), abs=1e-5)


def test_fewer_held_streams_cost_more_executions(llm):
    executions = []
    for held_streams in (1, 2, 3, 9):
        streams, before = MaskStreams(llm, WINDOWS, held_streams), llm.component_executions
        for component in llm.shape.components:
            streams.loss_without(component)
        executions.append(llm.component_executions - before)
    behind = 7 * 8 // 2
    assert executions[0] == behind + 7 * 8 // 2, "each trial starts from the embedding"
    assert executions[-1] == behind + 7, "the stream advances by one from trial to trial"
    assert executions == sorted(set(executions), reverse=True)


def test_streams_in_front_of_a_new_removal_are_kept(llm):
    streams, mask = MaskStreams(llm, WINDOWS), PruningMask.all_kept(llm.shape)
    streams.loss()
    before = llm.component_executions
    streams.move_to(mask.drop("layer2.attention"))  # position 4 of 8
    streams.loss()
    assert llm.component_executions - before == 3


@pytest.mark.parametrize("held_streams", HELD)
def test_no_more_streams_are_held_than_allowed(llm, monkeypatch, held_streams):
    run, results, alive = DecoderLayer.run, [], []

    def watch(self, kind, hidden, context):
        alive.append(sum(result() is not None for result in results))
        result = run(self, kind, hidden, context)
        results.append(weakref.ref(result))
        return result

    monkeypatch.setattr(DecoderLayer, "run", watch)
    meter, dense = RemovalMeter(llm, WINDOWS, held_streams=held_streams), PruningMask.all_kept(llm.shape)
    meter.trial(dense)
    for mask, component in random_trials(llm, 12, seed=held_streams):
        meter.trial(mask, component)
    # The embedding is one of the held, but no result. Beside them: the stream in front of a trial, the one being read.
    assert max(alive) <= min(held_streams, 9) - 1 + 2
    alive.clear()
    meter.trials(dense)  # beside them: the stream where trials part, the last trial's, the one being read
    assert max(alive) <= min(held_streams, 9) - 1 + 3


def test_masks_of_any_kind_are_measured_together_and_kept(llm, store, measured):
    dense = PruningMask.all_kept(llm.shape)
    masks = [dense.drop(*layer) for layer in by_layer(llm.shape.components)]
    before = llm.component_executions
    together = RemovalMeter(llm, WINDOWS, store).trials_of([dense, *masks])
    assert llm.component_executions - before == len(edges([dense, *masks]))
    assert together == {mask: RemovalMeter(llm, WINDOWS).trial(mask) for mask in [dense, *masks]}
    measured.clear()
    assert RemovalMeter(llm, WINDOWS, store).trials_of(masks) == {mask: together[mask] for mask in masks}
    assert measured == []
