"""Masks found for one kind of context are measured in all of them."""

import pytest
import torch

from experiments.context_masks import (
    half_costs,
    head_costs,
    part_costs,
    scores_of,
    without_cheapest_bytes,
    without_cheapest_heads,
)
from experiments.contexts import DRAWS, WORKLOAD, Part, measure
from rap_env.components import ATTENTION
from rap_env.evaluation.divergence import DivergenceEvaluator
from rap_env.evaluation.harness import HarnessEvaluator
from rap_env.evaluation.meter import Meter
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.llm.loading import load_llm
from rap_env.mask import PruningMask
from rap_env.memory.footprint import bytes_by_name, dense_bytes, footprint
from rap_env.memory.workload import Workload
from rap_env.widths.prepare import prepare_widths


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAP_CACHE", str(tmp_path_factory.mktemp("cache")))
        llm = load_llm("tiny", granularity="group")
        prepare_widths(llm, windows(0, 4))
        yield llm


def windows(seed: int, n_windows: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (n_windows, 24), generator=torch.Generator().manual_seed(seed))


class ToyTexts:
    """Noise in place of text."""

    def search(self, name: str, draw: int):
        return DivergenceEvaluator(windows(draw + 10 * len(name)), f"{name}, {draw}", 6)

    def report(self, name: str):
        if name.startswith("recall"):
            return [HarnessEvaluator("rap_recall_128_report", limit=2, metric="smooth_acc")]
        return [PerplexityEvaluator(window[None], name, 6) for window in windows(5 * len(name))]


def test_costs_are_falls_of_the_score_for_each_head_and_each_half_of_an_mlp(llm):
    meter, dense = Meter(llm, ToyTexts().search("noise", 0)), PruningMask.all_kept(llm.shape)
    heads, halves = head_costs(meter), half_costs(meter)
    names = [component.name for component in llm.shape.components if component.site.kind == ATTENTION]
    assert list(heads) == names and len(halves) == llm.shape.n_layers
    alone = meter.evaluate([dense, dense.drop(names[1])])
    assert heads[names[1]] == pytest.approx(alone[0].score - alone[1].score)
    parts = part_costs(llm.shape, halves, scores_of(llm))
    for site, cost in halves.items():
        own = [parts[component.name] for component in llm.shape.components if component.site == site]
        assert sum(own[len(own) // 2 :]) == pytest.approx(max(cost, 0.0)) and own == sorted(own, reverse=True)


def test_the_cheapest_heads_go_wherever_they_stand(llm):
    names = [component.name for component in llm.shape.components if component.site.kind == ATTENTION]
    costs = {name: float(number * 7 % len(names)) for number, name in enumerate(names)}
    mask = without_cheapest_heads(llm.shape, costs, 2)
    assert {component.name for component in mask.dropped} == set(sorted(names, key=costs.__getitem__)[:2])


def test_bytes_are_freed_where_they_cost_least_and_mlps_lose_their_last_groups(llm):
    workload = Workload(1, 64)
    freed = bytes_by_name(llm.shape, workload)
    costs = {component.name: freed[component.name] * (1 + component.site.layer) for component in llm.shape.components}
    mask = without_cheapest_bytes(llm.shape, costs, workload, 0.9)
    assert footprint(llm.shape, mask, workload).peak_bytes <= 0.9 * dense_bytes(llm.shape, workload)
    assert {component.site.layer for component in mask.dropped} <= {0, 1}, "the layers that cost least for their bytes"
    for site, bits in mask.kept_parts:
        assert site.kind == ATTENTION or list(bits) == sorted(bits, reverse=True)
    (last,) = (mask.restore(component) for component in mask.dropped[-1:])
    assert footprint(llm.shape, last, workload).peak_bytes > footprint(llm.shape, mask, workload).peak_bytes


def test_every_mask_of_both_draws_is_measured_in_every_column(llm):
    part = Part(("a", "bb"), ("a", "bb", "recall"), heads=(1,), budget_ratios=(0.9,), dense_only=("ccc",))
    steps = []
    results = measure(llm, ToyTexts(), part, None, lambda done, total: steps.append((done, total)))
    assert set(results["masks"]) == {"1 KV heads dropped", "90% of all bytes"}
    assert set(results["dense"]) == {"a", "bb", "recall", "ccc"} and results["dense"]["recall"]["items"] == 2
    for of_rows in results["measured"].values():
        assert {row: len(draws) for row, draws in of_rows.items()} == {"a": DRAWS, "bb": DRAWS}
        assert all(len(of_mask["bb"]) == 2 and "acc" in of_mask["recall"] for of in of_rows.values() for of_mask in of)
    mask = PruningMask.all_kept(llm.shape).drop(*results["masks"]["90% of all bytes"]["bb"][1])
    expected = [-next(iter(each.evaluate_many(llm, [mask])))[1].score for each in ToyTexts().report("a")]
    assert results["measured"]["90% of all bytes"]["bb"][1]["a"] == pytest.approx(expected)
    assert footprint(llm.shape, mask, WORKLOAD).peak_bytes <= 0.9 * dense_bytes(llm.shape, WORKLOAD)
    assert steps == sorted(steps) and steps[-1] == (8, 9) and results["search_tokens"]["a"] > 0
