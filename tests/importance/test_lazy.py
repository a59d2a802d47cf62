"""The lazy rule: exact where importance only grows, true losses everywhere, less work."""

import pytest
import torch

from rap_env.evaluation.meter import Meter
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.importance import lazy as lazy_rule
from rap_env.importance.block_influence import block_influence
from rap_env.importance.gsi import greedy_sequential_importance
from rap_env.importance.lazy import split_windows
from rap_env.llm.loading import build_tiny_llm
from tests.importance.cases import REST, SKETCH, WINDOWS, loss_of, measure_by_rule


def growing(weights: dict[str, float]):
    """Losses that rise by more for each component, the more others are gone."""
    return lambda dropped: sum(weights[name] for name in dropped) * len(dropped)


def seen_on_parts(loss_by_rule, deviations: dict[str, float]):
    """A rule for all windows, as evaluators of all or of a part see it: the sketch is off by something for each.

    What the rest is off by makes up for it in the weighted mean.
    """
    share = {WINDOWS.numel(): 0.0, SKETCH.numel(): 1.0, REST.numel(): -SKETCH.numel() / REST.numel()}
    return lambda tokens, dropped: loss_by_rule(dropped) + share[tokens] * sum(deviations[name] for name in dropped)


@pytest.fixture(scope="module")
def deep_llm():
    """A random Llama of 12 layers, 24 components."""
    return build_tiny_llm("llama", n_layers=12, seed=5)


@pytest.mark.parametrize("deviation", [0.0, 0.2])
@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_it_equals_the_exact_rule_where_importance_only_grows(llm, monkeypatch, step, deviation):
    names = [component.name for component in llm.shape.components]
    weights = {name: float(step * position % 8 + 1) for position, name in enumerate(names)}
    deviations = {name: deviation * (position % 3 - 1) for position, name in enumerate(names)}
    measure_by_rule(monkeypatch, seen_on_parts(growing(weights), deviations))
    exact = greedy_sequential_importance(llm, WINDOWS, exact=True)
    lazy = greedy_sequential_importance(llm, WINDOWS)
    assert lazy.order == exact.order == tuple(sorted(weights, key=weights.get))
    assert lazy.losses == pytest.approx(exact.losses)
    assert lazy.evaluations < exact.evaluations
    assert lazy.tokens < exact.tokens


@pytest.mark.parametrize("partner", ["layer1.mlp", "layer0.mlp"])
@pytest.mark.parametrize("n_windows", [1, 5])
def test_a_component_whose_importance_falls_beside_a_removal_is_found(llm, monkeypatch, partner, n_windows):
    first, fall, windows = "layer1.attention", 3.0, WINDOWS[:n_windows]
    weights = {component.name: 1.5 + 0.01 * position for position, component in enumerate(llm.shape.components)}
    weights |= {first: 1.0, partner: 1.49 + fall}  # without the first, the partner weighs 1.49, less than all others

    def loss(_tokens, dropped):
        return sum(weights[name] for name in dropped) - (fall if {first, partner} <= set(dropped) else 0.0)

    measure_by_rule(monkeypatch, loss)
    lazy = greedy_sequential_importance(llm, windows)
    assert lazy.order[:2] == (first, partner)
    assert lazy.order == greedy_sequential_importance(llm, windows, exact=True).order


def test_a_component_that_the_sketch_misjudges_is_measured_on_the_other_windows_once(llm, monkeypatch):
    misjudged, trials = "layer0.mlp", []
    names = [component.name for component in llm.shape.components]
    weights = {name: 1.0 + 0.1 * position for position, name in enumerate(names)} | {misjudged: 20.0}
    deviations = dict.fromkeys(names, 0.0) | {misjudged: -19.95}  # the least important of all, says the sketch
    rule = seen_on_parts(lambda dropped: sum(weights[name] for name in dropped), deviations)
    measure_by_rule(monkeypatch, lambda *trial: trials.append(trial) or rule(*trial))
    lazy = greedy_sequential_importance(llm, WINDOWS, removals=3)
    assert lazy.order[:3] == (
        "layer0.attention",
        "layer1.attention",
        "layer1.mlp",
    )  # all beside it: it is looked at again
    # Its influence screens it out in the first round.
    assert sum(tokens == SKETCH.numel() and misjudged in dropped for tokens, dropped in trials) == 2
    assert sum(tokens == REST.numel() and misjudged in dropped for tokens, dropped in trials) == 1


@pytest.mark.parametrize("n_windows", [1, 2, 3, 4, 5])
def test_every_loss_is_that_of_the_shrunk_model_on_all_windows(llm, n_windows):
    windows = WINDOWS[:n_windows]
    lazy = greedy_sequential_importance(llm, windows)
    assert sorted(lazy.order) == sorted(component.name for component in llm.shape.components)
    assert lazy.losses == pytest.approx([loss_of(llm, lazy.order[: k + 1], windows) for k in range(8)], abs=1e-5)
    assert lazy.dense_loss == pytest.approx(loss_of(llm, [], windows), abs=1e-5)
    assert lazy.evaluations <= 36


def test_a_deep_models_losses_are_true_and_take_fewer_tokens_than_the_exact_rule(deep_llm, measured):
    lazy = greedy_sequential_importance(deep_llm, WINDOWS, removals=12)
    assert lazy.losses == pytest.approx([loss_of(deep_llm, lazy.order[: k + 1]) for k in range(12)], abs=1e-5)
    exact_trials = sum(range(13, 25))
    assert lazy.evaluations < exact_trials
    assert lazy.tokens < exact_trials * WINDOWS.numel() / 2
    on_sketch = [measurement for measurement in measured if measurement.tokens == SKETCH.numel()]
    assert len(on_sketch) > len(measured) - len(on_sketch), "the sketch rules some out"


@pytest.mark.parametrize("n_windows", [1, 2, 5])
def test_evaluations_and_tokens_are_those_of_what_was_measured(llm, measured, n_windows):
    windows = WINDOWS[:n_windows]
    lazy = greedy_sequential_importance(llm, windows)
    masked = [measurement for measurement in measured if measurement.dropped]
    assert lazy.evaluations == len({measurement.dropped for measurement in masked}), "one a mask, however much of it"
    influence_tokens = split_windows(windows)[0].numel()
    assert lazy.tokens == sum(measurement.tokens for measurement in measured) + influence_tokens
    assert len(masked) - len(measured) == (-1 if n_windows == 1 else -2), "the dense loss of each part is no mask tried"


def test_one_window_is_its_own_sketch(llm, measured):
    lazy = greedy_sequential_importance(llm, WINDOWS[:1])
    assert {measurement.tokens for measurement in measured} == {16}
    assert len(set(measured)) == len(measured), "nothing is measured again for want of other windows"
    looked = [name for (_tokens, (name, *more)) in measured[1:] if not more]
    assert len(looked) >= 4
    first = {name: lazy.increases[name] for name in looked[:4]}
    assert first == pytest.approx(
        {name: loss_of(llm, [name], WINDOWS[:1]) - lazy.dense_loss for name in first}, abs=1e-5
    )


def test_the_first_round_looks_at_the_least_influential_and_tries_a_fifth_on_all_windows(llm, measured):
    lazy = greedy_sequential_importance(llm, WINDOWS, removals=1)

    def increases(windows):
        return {c.name: loss_of(llm, [c.name], windows) - loss_of(llm, [], windows) for c in llm.shape.components}

    on_sketch, on_all = increases(SKETCH), increases(WINDOWS)
    meter = Meter(llm, PerplexityEvaluator(SKETCH, "sketch"))
    influences = dict(zip(on_sketch, block_influence(meter, [[site] for site in llm.shape.sites]), strict=True))
    ranked = sorted(influences, key=influences.get)
    fifth = sorted(ranked[:4], key=on_sketch.get)[:2]
    most = max(ranked[:4], key=lambda name: (on_all if name in fifth else on_sketch)[name])
    expected = {name: on_sketch[name] for name in ranked[:4]} | {name: on_all[name] for name in fifth}
    for name in ranked[4:]:
        expected[name] = max(0.0, expected[most]) * influences[name] / influences[most]
    assert lazy.increases == pytest.approx(expected, abs=1e-5)
    on_rest = [measurement.dropped for measurement in measured if measurement.tokens == REST.numel()]
    assert on_rest[1:3] == [(name,) for name in fifth]  # after the dense loss


def test_a_component_that_was_screened_out_is_found_when_the_others_cost_more(llm, monkeypatch):
    names = [component.name for component in llm.shape.components]
    weights = {name: 1.0 + position for position, name in enumerate(names)}
    measure_by_rule(monkeypatch, lambda _tokens, dropped: sum(weights[name] for name in dropped))
    influences = {name: 1.0 for name in names} | {"layer0.mlp": 1.5}  # the second to go turns the stream most
    monkeypatch.setattr(lazy_rule, "block_influence", lambda meter, parts: [influences[site.name] for (site,) in parts])
    assert greedy_sequential_importance(llm, WINDOWS).order == tuple(names)


@pytest.mark.parametrize("removals", [0, 1, 3, 8, 100])
def test_some_removals_are_the_first_of_all(llm, lazy, removals):
    partial = greedy_sequential_importance(llm, WINDOWS, removals=removals)
    assert sorted(partial.order) == sorted(lazy.order)
    assert partial.order[:removals] == lazy.order[:removals]
    assert partial.losses == lazy.losses[:removals]
    assert partial.increases == (lazy.increases if removals else {})
    assert (partial.evaluations > 0) == (removals > 0)


def test_after_some_removals_the_rest_is_ranked_by_what_was_measured_last(llm):
    lazy = greedy_sequential_importance(llm, WINDOWS[:1], removals=1)  # on one window, all losses are those of round 1
    left = [name for name in lazy.increases if name != lazy.order[0]]
    assert list(lazy.order[1:]) == sorted(left, key=lazy.increases.get)


@pytest.mark.parametrize("n_windows", range(1, 13))
def test_the_sketch_is_the_first_windows_and_the_rest_the_others(n_windows):
    windows = torch.arange(n_windows)[:, None].expand(-1, 4)
    parts = split_windows(windows)
    assert len(parts) == min(2, n_windows)
    assert all(len(part) for part in parts)
    assert torch.equal(torch.cat(parts), windows)
