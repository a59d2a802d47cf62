"""Block influence is what it says: 1 minus the cosine between what goes into a part and what comes out."""

import pytest
import torch

from rap_env.importance.block_influence import block_influence
from rap_env.llm.architecture import decoder_layers
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import by_layer
from tests.importance.cases import WINDOWS


def blocks(llm) -> list:
    return [(component,) for component in llm.shape.components]


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
    assert block_influence(llm, WINDOWS, by_layer(llm.shape.components)) == pytest.approx(expected, abs=1e-5)


def test_one_forward_measures_everything(llm):
    before = llm.component_executions
    assert len(block_influence(llm, WINDOWS, blocks(llm))) == 8
    assert llm.component_executions - before == 8


def test_what_adds_nothing_has_no_influence_and_what_turns_everything_around_has_the_most():
    llm = build_tiny_llm(seed=5)
    idle, reversing = llm.shape.components[2], llm.shape.components[5]  # layer1.attention, layer2.mlp
    decoder_layers(llm.model)[1].module.self_attn.o_proj.weight.zero_()
    plain = llm._layers[2].run
    llm._layers[2].run = lambda kind, hidden, context: -hidden if kind == "mlp" else plain(kind, hidden, context)
    influence = block_influence(llm, WINDOWS, blocks(llm))
    assert influence[llm.shape.components.index(idle)] == pytest.approx(0.0, abs=1e-6)
    assert influence[llm.shape.components.index(reversing)] == pytest.approx(2.0, abs=1e-6)
    assert all(0.0 < value < 2.0 for i, value in enumerate(influence) if i not in (2, 5))


def test_cosines_are_not_rounded_to_bfloat16():
    llm = build_tiny_llm(dtype="bfloat16")
    influence = torch.tensor(block_influence(llm, WINDOWS, blocks(llm)))
    assert influence.bfloat16().float().ne(influence).all()


@pytest.mark.parametrize("wrong", [lambda parts: parts[:-1], lambda parts: parts[::-1], lambda parts: []])
def test_parts_that_are_not_the_model_in_order_are_refused(llm, wrong):
    with pytest.raises(ValueError, match="expected parts that are the model's 8 components in order; got"):
        block_influence(llm, WINDOWS, wrong(blocks(llm)))
