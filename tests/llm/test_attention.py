"""Attention in blocks of queries reads what PyTorch's own reads, as far as bfloat16 can tell."""

import pytest
import torch
from torch.nn import functional

from rap_env.llm import widened
from rap_env.llm.attention import attention


@pytest.fixture(params=[(True, True), (True, False), (False, False)], ids=["AMX", "no AMX", "no bfloat16"])
def processor(request, monkeypatch):
    """All ways, whatever the processor has; each is right on any."""
    multiplies_bfloat16, has_amx = request.param
    monkeypatch.setattr(widened, "multiplies_bfloat16", lambda: multiplies_bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize(
    ("sequences", "tokens", "heads", "groups"), [(1, 1, 4, 4), (3, 31, 4, 2), (5, 64, 2, 2), (13, 130, 9, 3)]
)
@torch.inference_mode()
def test_queries_read_what_they_see(processor, sequences, tokens, heads, groups, masked):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(sequences, tokens, n, 16, generator=generator).bfloat16().transpose(1, 2)
        for n in (heads, groups, groups)
    )
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(sequences, 1, -1, -1).clone()
    if masked:
        visible[::2, :, -1, : tokens // 2] = False
        visible |= torch.eye(tokens, dtype=torch.bool)
    exact = functional.scaled_dot_product_attention(
        *(states.double() for states in (query, key, value)), attn_mask=visible, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    read = attention(query, key, value, 0.3, visible if masked else None)
    assert read.shape == (sequences, tokens, heads, 16)
    assert (read - exact).abs().max() < 0.04
    assert (read - exact).abs().mean() < 0.003
    if masked and sequences > 1:  # one mask for all
        alike = attention(query, key, value, 0.3, visible[:1])
        assert torch.equal(alike[0], read[0])


@pytest.mark.parametrize(("tokens", "before"), [(40, 17), (1, 3), (64, 64), (130, 1), (130, 100), (65, 400)])
@torch.inference_mode()
def test_prefixes_lie_in_front_of_what_is_read_and_need_no_mask(processor, tokens, before):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, tokens, 16, generator=generator).bfloat16()
    key, value = (torch.randn(2, 3, before + tokens, 16, generator=generator).bfloat16() for _ in range(2))
    visible = torch.ones(1, 1, tokens, before + tokens, dtype=torch.bool).tril(before)
    exact = functional.scaled_dot_product_attention(
        *(states.double() for states in (query, key, value)), attn_mask=visible, enable_gqa=True
    ).transpose(1, 2)
    read = attention(query, key, value, None, visible)
    assert (read - exact).abs().max() < 0.04
    assert torch.equal(attention(query, key, value), read)
