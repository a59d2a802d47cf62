"""Formats of sites are chosen as a search over all combinations would, and losses are those of models made anew."""

import itertools

import numpy as np
import pytest
import torch

from rap_env.errors import InvalidConfig
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.importance.bits import FormatTable, MixedFormats, SiteFormat
from rap_env.llm.formats import quantise
from rap_env.llm.switchable import SwitchableLLM
from tests.llm.quantised_cases import build

FORMATS = ("int8", "int4", "int4g32")
SITES = [f"layer{index}.{kind}" for index in range(3) for kind in ("attention", "mlp")]


def random_table(seed: int) -> FormatTable:
    generator = np.random.default_rng(seed)
    rows = []
    for name in SITES:
        sizes = sorted(4 * generator.integers(10, 200, size=3), reverse=True)
        costs = [0.0, *(1e-4 * generator.normal(1, 1, size=2))]
        rows += [SiteFormat(name, *row) for row in zip(FORMATS, map(int, sizes), map(float, costs), strict=True)]
    return FormatTable(3.0, 1_001, tuple(rows))


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_of_all_combinations(seed):
    table = random_table(seed)
    combinations = [dict(zip(SITES, chosen, strict=True)) for chosen in itertools.product(FORMATS, repeat=len(SITES))]
    most = table.weight_bytes({})
    for budget in np.linspace(table.least_bytes, most, 6).astype(int):
        best = min(table.increase(each) for each in combinations if table.weight_bytes(each) <= budget)
        weights = table.cheapest(budget)
        assert table.weight_bytes(weights) <= budget and "int8" not in weights.values()
        assert table.increase(weights) == pytest.approx(best, abs=1e-12)


def test_a_table_by_hand():
    rows = [
        *(SiteFormat("layer0.attention", *row) for row in [("int8", 100, 0.0), ("int4", 60, 0.5)]),
        *(SiteFormat("layer0.mlp", *row) for row in [("int8", 200, 0.0), ("int4", 120, 0.75)]),
    ]
    table = FormatTable(2.0, 50, tuple(rows))
    assert table.least_bytes == 50 + 60 + 120
    assert table.cheapest(350) == {}
    assert table.cheapest(310) == {"layer0.attention": "int4"}  # saves 40 for 0.5
    assert table.cheapest(309) == {"layer0.mlp": "int4"}  # saves 80 for 0.75
    assert table.cheapest(230) == {"layer0.attention": "int4", "layer0.mlp": "int4"}
    assert table.increase(table.cheapest(230)) == 1.25
    with pytest.raises(InvalidConfig, match=r"a budget of at least 230 bytes, .* smallest format; got 229"):
        table.cheapest(229)


@pytest.mark.parametrize("member", ["llama, tied, biases", "opt"])
def test_losses_and_bytes_of_the_table_are_those_of_models_made_anew(member):
    loaded = build(member, granularity="block")
    before = loaded.digest
    mixed = MixedFormats(loaded)
    windows = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(3))
    evaluator, calls = PerplexityEvaluator(windows, "text"), []
    table = mixed.table(evaluator, ["int4"], lambda done, total: calls.append((done, total)))
    assert calls == [(done, 4) for done in (1, 2, 3, 4)]
    for name in table.sites:
        anew = build(member, {name: "int4"}, granularity="block")
        assert -evaluator.evaluate(anew).score - table.loss == table.increase({name: "int4"})
        assert anew.shape.weight_bytes == table.weight_bytes({name: "int4"})
    assert mixed.llm.digest == build(member, "int8").digest and loaded.digest == before
    weights = table.cheapest(table.least_bytes)
    assert weights == dict.fromkeys(table.sites, "int4")
    whole = SwitchableLLM(quantise(build(member).model, "int4"), None, "int4")
    assert mixed.loss(evaluator, weights) == -evaluator.evaluate(whole).score
    assert whole.shape.weight_bytes == table.least_bytes


def test_sites_are_put_back_when_the_body_raises():
    mixed = MixedFormats(build("llama", granularity="block"))
    before = mixed.llm.digest
    with pytest.raises(KeyboardInterrupt), mixed.sites_in({"layer1.mlp": "int4"}) as llm:
        assert llm.digest != before
        raise KeyboardInterrupt
    assert mixed.llm.digest == before
