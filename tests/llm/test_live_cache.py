"""A live KV cache across masks: what stays is what it was, what comes back sees what came since, or all of it."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from rap_env.errors import InvalidMask, UnsupportedArchitecture
from rap_env.llm import parts
from rap_env.llm.architecture import decoder_layers
from rap_env.llm.formats import quantise
from rap_env.llm.live_cache import carried, read_again
from rap_env.llm.loading import build_random_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from tests.llm.test_parts import GROUP, MEMBERS

READ, NEXT = torch.randint(3, 256, (3, 14), generator=torch.Generator().manual_seed(0)).split([8, 6], dim=1)
FULL = [member for member in MEMBERS if "window" not in member]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(parts, "GROUP_CHANNELS", GROUP)


def build(member: str = "llama, 2 KV heads", granularity: str = "group", kv_cache: str = "full") -> SwitchableLLM:
    whole = build_random_llm(*MEMBERS[member])
    return SwitchableLLM(quantise(whole.model, kv_cache=kv_cache), whole.tokenizer, "live", granularity)


def some_heads(llm: SwitchableLLM, numbers: list[int]) -> PruningMask:
    """Keeps as many heads of each attention as the list says, in turn, and all channels."""
    widths, attentions = [], 0
    for site, own in llm.shape.components.sites:
        width = own.stop - own.start
        if site.kind == "attention":
            width, attentions = min(width, numbers[attentions % len(numbers)]), attentions + 1
        widths.append(width)
    return PruningMask.from_widths(llm.shape, widths)


@torch.inference_mode()
def going_on(llm: SwitchableLLM, cache: DynamicCache, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [B, 6, V] of the next tokens, one by one."""
    found = []
    for number, token in enumerate(NEXT.split(1, dim=1), 1):
        inputs = {}
        if attention_mask is not None:
            longer = torch.cat([attention_mask, torch.ones(len(NEXT), number, dtype=torch.long)], 1)
            inputs = {"attention_mask": longer, "position_ids": longer.sum(-1, keepdim=True) - 1}
        found.append(llm.model(token, past_key_values=cache, **inputs).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("granularity", ["group", "block"])
def test_what_stays_is_taken_over_and_the_rest_leaves_memory(member, granularity):
    llm = build(member, granularity)
    everything, fewer = PruningMask.all_kept(llm.shape), some_heads(build(member, granularity), [1, 0, 2])
    cache = read_again(llm, READ)
    before = sum(layer.keys.nbytes for layer in cache.layers)
    expected = {site.layer: sum(bits) / len(bits) for site, bits in fewer.kept_parts if site.kind == "attention"}
    cache = carried(llm, cache, everything, fewer)
    assert sum(layer.keys.nbytes for layer in cache.layers) == pytest.approx(
        before * sum(expected.values()) / len(expected)
    )
    llm.apply(fewer)
    whole = going_on(llm, cache)
    assert torch.isfinite(whole).all() and cache.get_seq_length() in (READ.shape[1] + NEXT.shape[1], 4)


@pytest.mark.parametrize("member", FULL)
def test_heads_that_come_back_see_the_tokens_since_and_the_others_all(member):
    """Against a cache whose attention is told by an explicit mask, for each query head, what it may see."""
    llm = build(member)
    everything, fewer = PruningMask.all_kept(llm.shape), some_heads(llm, [1, 0, 2])
    dropped = {site.layer: bits for site, bits in fewer.kept_parts if site.kind == "attention"}
    cache = carried(llm, read_again(llm, READ), everything, fewer)
    llm.apply(fewer)
    with torch.inference_mode():
        llm.model(NEXT[:, :1], past_key_values=cache)
    back = carried(llm, cache, fewer, everything)
    hand = DynamicCache()
    llm.apply(everything)
    for layer in back.layers:
        hand.update(layer.keys.clone(), layer.values.clone(), len(hand.layers))
    found = going_on(llm, back)

    handles = []
    for index, layer in enumerate(decoder_layers(llm.model)):
        attention = layer.module.self_attn
        groups = attention.q_proj.out_features // attention.k_proj.out_features

        def explicit(module, args, kwargs, index=index, groups=groups):
            n_tokens = hand.layers[index].get_seq_length() + 1
            starts = torch.tensor([0 if bit else READ.shape[1] + 1 for bit in dropped[index]])
            seen = torch.arange(n_tokens) >= starts.repeat_interleave(groups)[None, :, None, None]
            return args, kwargs | {"attention_mask": seen}

        handles.append(attention.register_forward_pre_hook(explicit, with_kwargs=True))
    expected = going_on(llm, hand)
    for handle in handles:
        handle.remove()
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, going_on(llm, read_again(llm, torch.cat([READ, NEXT[:, :1]], 1))), atol=1e-3)


@pytest.mark.parametrize("member", ["llama, 2 KV heads", "qwen3", "opt"])
@pytest.mark.parametrize("kv_cache", ["full", "int8"])
def test_a_past_that_is_read_again_is_that_of_a_run_with_this_mask_from_the_start(member, kv_cache):
    llm = build(member, kv_cache=kv_cache)
    llm.apply(some_heads(llm, [1, 2]))
    padding = torch.ones_like(READ)
    padding[0, :3] = padding[2, :5] = 0
    together = going_on(llm, read_again(llm, READ, padding), padding)
    for row, pads in enumerate([3, 0, 5]):
        alone = read_again(llm, READ[row : row + 1, pads:])
        with torch.inference_mode():
            expected = [llm.model(t, past_key_values=alone).logits for t in NEXT[row : row + 1].split(1, dim=1)]
        assert torch.allclose(together[row], torch.cat(expected, 1)[0], atol=2e-2 if kv_cache == "int8" else 1e-4)


def test_padded_sequences_stay_what_they_are_alone_when_heads_come_back():
    llm = build()
    everything, fewer = PruningMask.all_kept(llm.shape), some_heads(llm, [1, 0, 2])
    padding = torch.ones_like(READ)
    padding[1, :4] = 0
    llm.apply(fewer)
    together = read_again(llm, READ, padding)
    alone = read_again(llm, READ[1:2, 4:])
    llm.apply(everything)
    together, alone = (carried(llm, cache, fewer, everything) for cache in (together, alone))
    found = going_on(llm, together, padding)[1]
    with torch.inference_mode():
        expected = [llm.model(token, past_key_values=alone).logits for token in NEXT[1:2].split(1, dim=1)]
    assert torch.allclose(found, torch.cat(expected, 1)[0], atol=1e-4)


def test_caches_that_do_not_belong_to_the_mask_are_refused():
    llm = build()
    everything, none = PruningMask.all_kept(llm.shape), some_heads(llm, [0])
    cache = read_again(llm, READ)
    with pytest.raises(InvalidMask, match="expected a KV cache of the 0 attentions"):
        carried(llm, DynamicCache(), none, everything)
    with pytest.raises(InvalidMask, match="got one of 0 layers"):
        carried(llm, DynamicCache(), everything, everything)
    with pytest.raises(InvalidMask, match="got one of 1 layers"):
        cache.layers = cache.layers[:1]
        carried(llm, cache, everything, everything)
    window = build("mistral, window")
    fewer = some_heads(window, [1])
    window.apply(fewer)
    with pytest.raises(UnsupportedArchitecture, match="has to read its past again"):
        carried(window, read_again(window, READ), fewer, PruningMask.all_kept(window.shape))
