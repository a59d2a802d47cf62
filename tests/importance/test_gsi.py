"""Greedy removal finds the order of a brute-force search, and pays for its work in tokens."""

import dataclasses
import inspect

import pytest
import torch

from rap_env.errors import EvaluationFailed, InvalidWorkload, SearchExhausted
from rap_env.evaluation.meter import Meter, TokenBudget
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.importance.gsi import greedy_sequential_importance
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from tests.importance.cases import WINDOWS, brute_force, edges, loss_of

RULES = pytest.mark.parametrize("exact", [True, False], ids=["exact", "lazy"])


def test_the_order_and_its_losses_equal_a_brute_force_search(llm, ranking):
    order, losses, rounds = brute_force(llm, 8)
    assert list(ranking.order) == order
    assert ranking.losses == pytest.approx(losses, abs=1e-5)
    assert ranking.dense_loss == pytest.approx(loss_of(llm, []), abs=1e-5)
    increases = {name: loss - loss_of(llm, []) for name, loss in rounds[0].items()}
    assert ranking.increases == pytest.approx(increases, abs=1e-5)


def test_a_full_ranking_of_eight_components_takes_36_evaluations(ranking):
    assert ranking.evaluations == 8 * 9 // 2 == 36
    assert ranking.tokens == 37 * 5 * 16, "the dense model is paid for, too"
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


def test_the_masks_of_a_round_share_what_lies_in_front_of_their_removals(llm, ranking):
    mask, n_edges = PruningMask.all_kept(llm.shape), []
    for name in ranking.order:
        n_edges.append(len(edges([mask.drop(component) for component in mask.kept])))
        mask = mask.drop(name)
    # Of 8 masks 7 share a beginning with the next, and what follows is 7, 6, ..., 0 long.
    assert n_edges[0] == 7 + 7 * 8 // 2
    before = llm.site_executions
    greedy_sequential_importance(llm, WINDOWS, exact=True)
    assert llm.site_executions - before == 8 + sum(n_edges), "the dense model, and the rounds"
    assert sum(n_edges) < sum(k * (k - 1) for k in range(1, 9)), "whole forwards run k - 1 in each of k masks"


def test_single_removals_start_where_they_part_from_the_mask_of_their_round(llm):
    dense, evaluator = PruningMask.all_kept(llm.shape), PerplexityEvaluator(WINDOWS, "toy")
    meter = Meter(llm, evaluator)
    meter.evaluate([dense.drop("layer3.mlp")], near=dense)  # 7 in front of it
    before = llm.site_executions
    held = meter.evaluate([dense.drop("layer2.attention")], near=dense)  # position 4 of 8: 3 follow
    assert llm.site_executions - before == 3
    shrunk = dense.drop("layer2.attention")
    before = llm.site_executions
    held += meter.evaluate([shrunk.drop("layer3.mlp")], near=shrunk)  # 4 are held, 2 more in front of it
    assert llm.site_executions - before == 2
    assert held == Meter(llm, evaluator).evaluate([shrunk, shrunk.drop("layer3.mlp")]), "equal without what is held"


def test_after_some_removals_the_rest_is_ranked_by_the_last_rounds_losses(llm, ranking):
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
    for cost in ("seconds", "tokens"):
        assert dataclasses.replace(ranking, **{cost: getattr(ranking, cost) + 1}) == ranking
    assert dataclasses.replace(ranking, dense_loss=ranking.dense_loss + 1) != ranking
    assert dataclasses.replace(ranking, increases=dict.fromkeys(ranking.order, 0.0)) != ranking


@RULES
def test_a_ranking_spends_the_token_budget_and_stops_where_it_ends(llm, ranking, lazy, exact):
    whole = ranking if exact else lazy
    budget = TokenBudget(whole.tokens)
    assert greedy_sequential_importance(llm, WINDOWS, exact=exact, budget=budget) == whole
    assert budget.left == 0
    assert greedy_sequential_importance(llm, WINDOWS, exact=exact, budget=budget).tokens == 0, "each mask is paid once"
    with pytest.raises(SearchExhausted, match="tokens are spent"):
        greedy_sequential_importance(llm, WINDOWS, exact=exact, budget=TokenBudget(whole.tokens - 1))


@RULES
@pytest.mark.parametrize("windows", [WINDOWS[:0], WINDOWS[:, :1]], ids=["none", "one token"])
def test_windows_with_nothing_to_predict_are_refused(llm, exact, windows):
    with pytest.raises(InvalidWorkload, match="expected at least 1 window of at least 2 tokens; got"):
        greedy_sequential_importance(llm, windows, exact=exact)


@RULES
def test_windows_beyond_the_models_context_are_refused(exact):
    llm = build_tiny_llm("opt")  # 512 tokens
    with pytest.raises(InvalidWorkload, match="windows of 513 tokens are beyond the model's context of 512"):
        greedy_sequential_importance(llm, torch.zeros(2, 513, dtype=torch.long), exact=exact)


@RULES
def test_activations_that_overflow_are_an_error_and_no_order(exact):
    hot = build_tiny_llm(dtype="float16")
    hot.model.model.layers[1].mlp.down_proj.weight.mul_(1e4).clamp_(-6e4, 6e4)
    hot.model.model.layers[1].mlp.up_proj.weight.mul_(1e4).clamp_(-6e4, 6e4)
    with pytest.raises(EvaluationFailed, match=r"not a finite number: activations overflow in float16"):
        greedy_sequential_importance(hot, WINDOWS, exact=exact)


def test_identity_layers_of_a_block_expansion_are_ranked_first_by_both_rules():
    llm = build_tiny_llm()
    for layer in (1, 3):
        llm.model.model.layers[layer].self_attn.o_proj.weight.zero_()
        llm.model.model.layers[layer].mlp.down_proj.weight.zero_()
    idle = {f"layer{layer}.{kind}" for layer in (1, 3) for kind in ("attention", "mlp")}
    for exact in (True, False):
        ranking = greedy_sequential_importance(llm, WINDOWS, exact=exact)
        harmless = sum(loss <= ranking.dense_loss + 1e-6 for loss in ranking.losses)
        assert idle <= set(ranking.order[:harmless]), exact
