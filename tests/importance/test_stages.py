"""Greedy removal in stages, where sites have parts."""

import itertools
import math

import pytest

from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.importance.gsi import CALIBRATION, greedy_sequential_importance
from rap_env.llm import parts
from rap_env.llm.loading import build_tiny_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from tests.importance.cases import WINDOWS


@pytest.fixture(scope="module", params=["llama", "opt"])
def grouped(request) -> SwitchableLLM:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "GROUP_CHANNELS", 8)
        tiny = build_tiny_llm(request.param, seed=3)
        yield SwitchableLLM(tiny.model, tiny.tokenizer, tiny.name, "group")


def loss_of(llm: SwitchableLLM, mask: PruningMask) -> float:
    ((_, evaluation),) = PerplexityEvaluator(WINDOWS, CALIBRATION).evaluate_many(llm, [mask])
    return -evaluation.score


def test_the_order_keeps_first_parts_and_its_losses_are_those_of_its_masks(grouped):
    ranking = greedy_sequential_importance(grouped, WINDOWS)
    mask = PruningMask.all_kept(grouped.shape)
    assert sorted(ranking.order) == sorted(row.name for row in mask.components)
    assert ranking.dense_loss == pytest.approx(loss_of(grouped, mask))
    stages = [list(group) for _, group in itertools.groupby(range(len(ranking.losses)), ranking.losses.__getitem__)]
    for position, name in enumerate(ranking.order):
        mask = mask.drop(name)
        assert mask.widths
        ends_stage = any(position == stage[-1] for stage in stages[:-1])
        if ends_stage:
            assert ranking.losses[position] == pytest.approx(loss_of(grouped, mask))
    assert len(stages) > 2


def test_first_removed_are_the_cheapest_steps_for_their_bytes(grouped):
    ranking = greedy_sequential_importance(grouped, WINDOWS, removals=1)
    dense, prices = PruningMask.all_kept(grouped.shape), {}
    for site in grouped.shape.sites:
        rows = [row for row in dense.components if row.site == site]
        step = rows[-math.ceil(len(rows) / 4) :]
        rise = loss_of(grouped, dense.drop(*step)) - ranking.dense_loss
        n_bytes = sum(row.weight_bytes for row in step)
        prices[site.name] = rise / n_bytes if rise > 0 else rise * n_bytes
    assert ranking.order[0].rpartition(".")[0] == min(prices, key=prices.__getitem__)


def test_a_ranking_of_many_parts_takes_few_evaluations(grouped):
    ranking = greedy_sequential_importance(grouped, WINDOWS)
    n_sites, n_parts = len(grouped.shape.sites), len(grouped.shape.components)
    assert ranking.evaluations < 5 * n_sites < n_parts * (n_parts + 1) / 2
    assert ranking.tokens >= ranking.evaluations * WINDOWS.numel()
