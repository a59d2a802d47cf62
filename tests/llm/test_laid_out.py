"""Live models in bfloat16 on a CPU: matrices that were laid out once, and memory that is taken once."""

import gc
import operator

import pytest
import torch
from torch import nn

from rap_env.errors import WeightsUnavailable
from rap_env.llm.kernels import LaidOutLinear, added, computes_bfloat16, gated
from rap_env.llm.live import LiveModel
from rap_env.llm.loading import build_random_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.mask import PruningMask
from rap_env.memory.measured import trim_freed_memory
from tests.llm.test_kernels import linear, states
from tests.llm.test_live_cache import FULL
from tests.llm.test_parts import MEMBERS
from tests.llm.weights_cases import LARGE, every_other, everything, half, own_cache, resident_bytes  # noqa: F401

pytestmark = pytest.mark.skipif(not computes_bfloat16(), reason="this processor computes no bfloat16")
PROMPT = list(range(3, 40))


def build(member: str = "llama, 2 KV heads", dtype: str = "bfloat16", stored: bool = True, **sizes) -> LiveModel:
    family, own = MEMBERS[member]
    whole = build_random_llm(family, own | sizes, dtype=dtype)
    llm = SwitchableLLM(whole.model, whole.tokenizer, "laid out", "group")
    if stored:
        WeightStore(llm)
    return LiveModel(llm)


def read(live: LiveModel) -> torch.Tensor:
    """Logits behind a prompt and behind two tokens more."""
    cache = live.new_cache(len(PROMPT) + 2)
    return torch.stack([live.read([(cache, tokens)])[0] for tokens in (PROMPT, [7], [9])])


def laid_out(live: LiveModel) -> list[int]:
    """How many matrices of each site that runs are laid out."""
    paths = {kind: live.llm._layers[0].cuts(kind) for kind in ("attention", "mlp")}
    return [
        sum(type(layer.module.get_submodule(path)) is LaidOutLinear for path in next(iter(paths[site.kind].values())))
        for site, layer in live._layers.items()
    ]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 33])
def test_a_laid_out_matrix_computes_what_the_one_does_that_it_was_made_from(rows, bias):
    gate, up, down = linear(96, 160, bias, 1), linear(96, 160, bias, 3), linear(160, 96, bias, 5)
    down.weight.data = down.weight.data.T.contiguous().T  # output matrices lie by columns
    inputs, inner, residual = states(rows, 96, seed=7), states(rows, 160, seed=9), states(rows, 96, seed=8)
    own_gate, own_up, own_down = map(LaidOutLinear, (gate, up, down))
    torch.testing.assert_close(own_gate(inputs), gate(inputs))
    torch.testing.assert_close(
        gated(own_gate, own_up, nn.SiLU(), inputs), gated(gate, up, nn.SiLU(), inputs), rtol=0.02, atol=0.02
    )
    torch.testing.assert_close(added(own_down, inner, residual), added(down, inner, residual), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("member", FULL)
def test_a_model_reads_what_it_reads_without(member, tied):
    plain, live = (build(member, stored=stored, tie_word_embeddings=tied) for stored in (False, True))
    live.settle()
    assert type(live._laid_out.head) is LaidOutLinear
    for mask in (everything, half):
        expected = (plain.switch(mask(plain.llm)), read(plain))[1]
        live.switch(mask(live.llm))
        for found in (read(live), (live.settle(), read(live))[1]):
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_each_step_lays_one_site_out_and_a_switch_keeps_the_sites_that_it_does_not_change():
    live = build()
    assert sum(laid_out(live)) == 0
    live.read([(live.new_cache(1), [5])])
    assert [n > 0 for n in laid_out(live)] == [True] + [False] * (len(live.llm.shape.sites) - 1)
    assert live.settle() and not live.settle() and all(laid_out(live))
    before = dict(live._layers)
    widths = [1, *live.llm.shape.components.n_parts[1:]]
    live.switch(PruningMask.from_widths(live.llm.shape, widths))
    assert [n > 0 for n in laid_out(live)] == [False] + [True] * (len(widths) - 1)
    assert sum(layer is before.get(site) for site, layer in live._layers.items()) == len(widths) - 1


def test_nothing_is_laid_out_that_would_be_in_memory_twice():
    for live in (build(stored=False), build(dtype="float32")):
        assert not live.settle() and type(live._laid_out.head) is nn.Linear
    live = build()
    live.switch(every_other(live.llm))
    live.settle()
    runs_with_copies = [site.parts != tuple(range(len(site.parts or ()))) for site in live._layers]
    assert any(runs_with_copies) and not any(map(operator.and_, runs_with_copies, map(bool, laid_out(live))))


def test_weights_are_in_memory_once():
    live = build(**LARGE | {"vocab_size": 32_768, "tie_word_embeddings": True})
    taken = {}
    for mask in (narrow := half(live.llm), everything(live.llm)) * 2:  # first what libraries leave behind
        live.switch(mask)
        gc.collect()
        found = []
        for _ in range(2):
            read(live)
            trim_freed_memory()
            found.append(resident_bytes())
            live.settle()
        grown = abs(found[1] - found[0]) if mask in taken else 0
        assert grown < 0.03 * mask.weight_bytes
        taken[mask] = found[1]
    dropped_bytes = sum(component.weight_bytes for component in narrow.dropped)
    assert abs(taken[everything(live.llm)] - taken[narrow] - dropped_bytes) < 0.03 * dropped_bytes


def test_rows_that_the_heads_file_has_no_more_are_told():
    live = build(tie_word_embeddings=True)
    path = live._laid_out._embedding._memory.path
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(WeightsUnavailable, match="was cut"):
        live.read([(live.new_cache(1), [200])])
