"""Block influence is what it says: 1 minus the cosine between what goes into a part and what comes out."""

import pytest
import torch

from rap_env.errors import SearchExhausted
from rap_env.evaluation.meter import Meter, TokenBudget
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.importance.block_influence import block_influence
from rap_env.llm.architecture import decoder_layers
from rap_env.llm.loading import build_tiny_llm
from tests.conftest import CountingEvaluator
from tests.importance.cases import WINDOWS


def blocks(llm) -> list:
    return [(site,) for site in llm.shape.sites]


def layers(llm) -> list:
    return [llm.shape.sites[first : first + 2] for first in range(0, len(llm.shape.sites), 2)]


def meter_of(llm, **options) -> Meter:
    return Meter(llm, PerplexityEvaluator(WINDOWS, "toy"), **options)


def test_influence_of_layers_is_that_of_upstreams_own_forward(llm):
    streams = []

    def listen(module, arguments, keywords, output):
        behind = output[0] if isinstance(output, tuple) else output
        streams.append((arguments[0] if arguments else keywords["hidden_states"], behind))

    handles = [layer.module.register_forward_hook(listen, with_kwargs=True) for layer in decoder_layers(llm.model)]
    llm.model(WINDOWS, use_cache=False)
    for handle in handles:
        handle.remove()
    expected = []
    for before, behind in streams:
        cosines = (before * behind).sum(-1) / (before.norm(dim=-1) * behind.norm(dim=-1))
        expected.append(1.0 - cosines.mean().item())
    assert len(expected) == 4
    assert block_influence(meter_of(llm), layers(llm)) == pytest.approx(expected, abs=1e-5)


def test_one_forward_measures_everything(llm):
    before = llm.site_executions
    assert len(block_influence(meter_of(llm), blocks(llm))) == 8
    assert llm.site_executions - before == 8


def test_what_adds_nothing_has_no_influence_and_what_turns_everything_around_has_the_most():
    llm = build_tiny_llm(seed=5)
    idle, reversing = llm.shape.sites[2], llm.shape.sites[5]  # layer1.attention, layer2.mlp
    decoder_layers(llm.model)[1].module.self_attn.o_proj.weight.zero_()
    plain = llm._layers[2].run
    llm._layers[2].run = lambda kind, hidden, context: -hidden if kind == "mlp" else plain(kind, hidden, context)
    influence = block_influence(meter_of(llm), blocks(llm))
    assert influence[llm.shape.sites.index(idle)] == pytest.approx(0.0, abs=1e-6)
    assert influence[llm.shape.sites.index(reversing)] == pytest.approx(2.0, abs=1e-6)
    assert all(0.0 < value < 2.0 for i, value in enumerate(influence) if i not in (2, 5))


def test_cosines_are_not_rounded_to_bfloat16():
    llm = build_tiny_llm(dtype="bfloat16")
    influence = torch.tensor(block_influence(meter_of(llm), blocks(llm)))
    assert influence.bfloat16().float().ne(influence).all()


@pytest.mark.parametrize("wrong", [lambda parts: parts[:-1], lambda parts: parts[::-1], lambda parts: []])
def test_parts_that_are_not_the_model_in_order_are_refused(llm, wrong):
    with pytest.raises(ValueError, match="expected parts that are the model's 8 sites in order; got"):
        block_influence(meter_of(llm), wrong(blocks(llm)))


def test_influence_is_paid_for_once_and_kept_in_the_store(llm, store):
    budget = TokenBudget(100)
    first = block_influence(meter_of(llm, store=store, budget=budget), blocks(llm))
    assert budget.spent == WINDOWS.numel() == 80
    before = llm.site_executions
    assert block_influence(meter_of(llm, store=store, budget=budget), blocks(llm)) == first
    assert llm.site_executions == before and budget.spent == 80
    with pytest.raises(SearchExhausted, match="80 of 100 tokens are spent; 80 more were asked for"):
        block_influence(meter_of(llm, store=store, budget=budget), layers(llm))


def test_influence_without_windows_of_text_is_refused(llm):
    with pytest.raises(ValueError, match="needs windows of text; got CountingEvaluator"):
        block_influence(Meter(llm, CountingEvaluator()), blocks(llm))
