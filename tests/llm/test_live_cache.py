"""Reading ragged batches while masks change: what stays is what it was, what comes back sees what was asked for."""

import pytest
import torch

from rap_env.errors import InvalidWorkload, UnsupportedArchitecture
from rap_env.llm import int8_cache, parts
from rap_env.llm import live as live_module
from rap_env.llm.architecture import decoder_layers
from rap_env.llm.formats import quantise
from rap_env.llm.live import LiveModel, RaggedStream
from rap_env.llm.live_cache import SequenceCache
from rap_env.llm.loading import build_random_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from tests.llm.test_parts import GROUP, MEMBERS

FULL = [member for member in MEMBERS if "window" not in member]
LENGTHS = (8, 1, 13)  # of the prompts of a ragged batch
N_NEXT = 5


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(parts, "GROUP_CHANNELS", GROUP)


def build(member: str = "llama, 2 KV heads", granularity: str = "group", kv_cache: str = "full") -> LiveModel:
    whole = build_random_llm(*MEMBERS[member])
    return LiveModel(SwitchableLLM(quantise(whole.model, kv_cache=kv_cache), whole.tokenizer, "live", granularity))


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 256, (n + N_NEXT,), generator=generator).tolist() for n in LENGTHS]


def some_heads(live: LiveModel, numbers: list[int]) -> PruningMask:
    """Keeps as many heads of each attention as the list says, in turn, and all channels."""
    widths, attentions = [], 0
    for site, own in live.llm.shape.components.sites:
        width = own.stop - own.start
        if site.kind == "attention":
            width, attentions = min(width, numbers[attentions % len(numbers)]), attentions + 1
        widths.append(width)
    return PruningMask.from_widths(live.llm.shape, widths)


def everything(live: LiveModel) -> PruningMask:
    return PruningMask.all_kept(live.llm.shape)


def generated(live: LiveModel, caches: list[SequenceCache], tokens: list[list[int]]) -> list[torch.Tensor]:
    """Logits of all sequences as they go on token by token, together."""
    steps = []
    for place in range(max(map(len, tokens))):
        going = [row for row, own in enumerate(tokens) if place < len(own)]
        steps.append((going, live.read([(caches[row], [tokens[row][place]]) for row in going])))
    return [
        torch.stack([step[going.index(row)] for going, step in steps if row in going]) for row in range(len(tokens))
    ]


@torch.inference_mode()
def expected_logits(live: LiveModel, tokens: list[int], seen=None) -> torch.Tensor:
    """What upstream computes for all tokens in one pass [T, V]; `seen` tells what a KV head may see."""
    handles, n = [], len(tokens)
    for index, layer in enumerate(decoder_layers(live.llm.model) if seen else ()):
        attention = layer.module.self_attn
        n_heads = attention.q_proj.out_features // attention.head_dim
        group = n_heads // (attention.k_proj.out_features // attention.head_dim)
        allowed = torch.tensor(
            [[[seen(index, h // group, q, k) for k in range(n)] for q in range(n)] for h in range(n_heads)]
        )
        hook = lambda _m, args, kwargs, allowed=allowed: (args, kwargs | {"attention_mask": allowed[None]})  # noqa: E731
        handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))
    logits = live.llm.model(torch.tensor([tokens]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("member", FULL)
@pytest.mark.parametrize("granularity", ["group", "block"])
def test_a_ragged_batch_is_each_sequence_alone_as_upstream_reads_it(member, granularity):
    live, tokens = build(member, granularity), sequences()
    for mask in (everything(live), some_heads(live, [1, 0, 2])):
        live.switch(mask)
        caches = [live.new_cache(len(own)) for own in tokens]
        first = live.read([(cache, own[:n]) for cache, own, n in zip(caches, tokens, LENGTHS, strict=True)])
        later = generated(live, caches, [own[n:] for own, n in zip(tokens, LENGTHS, strict=True)])
        for row, own in enumerate(tokens):
            expected = expected_logits(live, own)[LENGTHS[row] - 1 :]
            assert torch.allclose(torch.cat([first[row : row + 1], later[row]]), expected, atol=1e-4)


@pytest.mark.parametrize("kv_cache", ["full", "int8"])
def test_a_prompt_read_in_pieces_beside_others_is_the_same(kv_cache):
    live, tokens = build(kv_cache=kv_cache), sequences()
    long, other = live.new_cache(18), live.new_cache(18)
    live.read([(other, tokens[0][:4])])
    live.read([(long, tokens[2][:5])])
    live.read([(other, tokens[0][4:5]), (long, tokens[2][5:6])])
    last = live.read([(long, tokens[2][6:18]), (other, tokens[0][5:6])])
    assert torch.allclose(last[0], expected_logits(live, tokens[2])[-1], atol=2e-2 if kv_cache == "int8" else 1e-4)


@pytest.mark.parametrize("member", FULL)
def test_dropped_heads_leave_memory_at_once_and_the_others_go_on_with_what_they_have(member):
    live, own = build(member), sequences()[0]
    fewer = some_heads(live, [1, 0, 2])
    cache = live.new_cache(len(own))
    live.read([(cache, own[:8])])
    assert cache.nbytes == everything(live).kv_bytes_per_token * len(own)
    live.switch(fewer)
    cache.switch(live.heads)
    assert cache.nbytes == fewer.kv_bytes_per_token * len(own)
    assert torch.isfinite(live.read([(cache, own[8:])])).all()


def seen_from(live: LiveModel, mask: PruningMask, since: int):
    """Heads that a mask drops see what comes from a place on."""
    dropped = {site.layer: bits for site, bits in mask.kept_parts if site.kind == "attention"}
    return lambda layer, head, query, key: key <= query and (dropped[layer][head] or key >= since or query < since)


@pytest.mark.parametrize("member", FULL)
def test_from_now_a_head_that_comes_back_sees_the_tokens_since(member):
    """What was read before comes from the whole model, so that only what later tokens see differs."""
    live, own = build(member), sequences()[0]
    cache = live.new_cache(len(own))
    live.read([(cache, own[:8])])
    fewer = some_heads(live, [1, 0, 2])
    live.switch(fewer)
    cache.switch(live.heads)
    live.switch(everything(live))
    cache.switch(live.heads, "from now")
    found = torch.stack([live.read([(cache, [token])])[0] for token in own[8:]])
    assert torch.allclose(found, expected_logits(live, own, seen_from(live, fewer, 8))[8:], atol=1e-4)
    assert cache.lacks(live.heads) and cache.nbytes == everything(live).kv_bytes_per_token * len(own)


@pytest.mark.parametrize("member", FULL)
@pytest.mark.parametrize("heads", [[1, 0, 2], [0]])
def test_left_out_heads_stay_dropped_for_the_sequence_and_not_for_others(member, heads):
    live, (own, *_others, other) = build(member), sequences()
    fewer = some_heads(live, heads)
    live.switch(fewer)
    cache = live.new_cache(len(own))
    live.read([(cache, own[:8])])
    live.switch(everything(live))
    cache.switch(live.heads)
    beside = live.new_cache(len(other))
    first = live.read([(cache, own[8:10]), (beside, other)])
    last = live.read([(cache, own[10:])])
    assert torch.allclose(first[1], expected_logits(live, other)[-1], atol=1e-4)
    with live.llm.pruned(fewer):  # all channels are kept in both masks
        expected = expected_logits(live, own)
    assert torch.allclose(torch.stack([first[0], last[0]]), expected[[9, -1]], atol=1e-4)
    assert cache.lacks(live.heads) and cache.nbytes == fewer.kv_bytes_per_token * len(own)
    assert not beside.lacks(live.heads)


def test_what_is_read_again_equals_a_run_with_this_mask_from_the_start():
    live, own = build(), sequences()[0]
    live.switch(some_heads(live, [1, 0, 2]))
    live.read([(live.new_cache(20), own[:8])])
    live.switch(everything(live))
    again = live.new_cache(len(own))
    live.read([(again, own[:8])])
    found = live.read([(again, own[8:])])
    fresh, start = build(), None
    start = fresh.new_cache(len(own))
    fresh.read([(start, own[:8])])
    assert torch.equal(found, fresh.read([(start, own[8:])])) and not again.lacks(live.heads)


def test_what_cannot_be_read_is_refused():
    live, own = build(), sequences()[0]
    cache, full = live.new_cache(9), live.new_cache(4)
    live.read([(cache, own[:8])])
    with pytest.raises(InvalidWorkload, match="expected at most 4 tokens of the sequence; got 5"):
        live.read([(cache, own[8:9]), (full, own[:5])])
    assert cache.length == 8 and full.length == 0
    with pytest.raises(UnsupportedArchitecture, match="looks back over 5"):
        build("mistral, window")


@pytest.mark.parametrize("kv_cache", ["full", "int8"])
@pytest.mark.parametrize("member", ["llama, 2 KV heads", "qwen3", "opt"])
def test_one_kernel_for_the_next_tokens_of_all_sequences_gives_what_one_for_each_gives(member, kv_cache, monkeypatch):
    live, tokens = build(member, kv_cache=kv_cache), sequences()
    steps, run_step = [], live._logits_of

    def counted(inputs: torch.Tensor, stream: RaggedStream) -> torch.Tensor:
        steps.append(len(stream.step))
        return run_step(inputs, stream)

    def logits_of_all() -> list[torch.Tensor]:
        live.switch(everything(live))
        caches = [live.new_cache(len(own)) for own in tokens]
        live.read([(cache, own[:-N_NEXT]) for cache, own in zip(caches, tokens, strict=True)])
        found = generated(live, caches, [own[-N_NEXT:-2] for own in tokens])
        for place, mask in ((-2, some_heads(live, [1, 0])), (-1, everything(live))):
            live.switch(mask)
            for cache in caches:
                cache.switch(live.heads)
            found.append(live.read([(cache, [own[place]]) for cache, own in zip(caches, tokens, strict=True)]))
        return found

    expected = logits_of_all()
    monkeypatch.setattr(live_module, "attends_together", lambda *_: True)
    monkeypatch.setattr(live, "_logits_of", counted)
    for own, wanted in zip(logits_of_all(), expected, strict=True):
        torch.testing.assert_close(own, wanted, rtol=0, atol=1e-4)
    assert steps == [3, 3, 3, 3], "the last one was read by sequences of which heads are left out"


@pytest.mark.parametrize("kv_cache", ["full", "int8"])
@pytest.mark.parametrize("member", ["llama, 2 KV heads", "qwen3", "opt"])
def test_next_tokens_beside_a_prompt_are_read_as_each_by_itself(member, kv_cache, monkeypatch):
    live, tokens, together = build(member, kv_cache=kv_cache), [*sequences(), list(range(3, 20))], []
    attend_together = live_module.attend_together

    def counted(caches: list[SequenceCache], *given) -> torch.Tensor:
        together.append(len(caches))
        return attend_together(caches, *given)

    def logits() -> torch.Tensor:
        live.switch(everything(live))
        caches = [live.new_cache(len(own)) for own in tokens]
        live.read([(cache, own[:4]) for cache, own in zip(caches[:3], tokens, strict=False)])
        live.switch(some_heads(live, [1, 2]))
        caches[1].switch(live.heads)
        live.switch(everything(live))
        caches[1].switch(live.heads)  # without a head that was dropped, so it attends by itself
        pieces = [own[4:5] for own in tokens[:3]]
        pieces.insert(1, tokens[3][:7])
        return live.read(list(zip([caches[0], caches[3], *caches[1:3]], pieces, strict=True)))

    expected = logits()
    monkeypatch.setattr(live_module, "attend_together", counted)
    monkeypatch.setattr(live_module, "attends_together", lambda *_: True)
    torch.testing.assert_close(logits(), expected, rtol=0, atol=1e-4)
    assert set(together) == {2}


@pytest.mark.parametrize("member", ["llama, 2 KV heads", "qwen3", "opt"])
def test_keys_and_values_are_encoded_once(member, monkeypatch):
    live, own = build(member, kv_cache="int8"), sequences()[0]

    def again(*_: object) -> None:
        raise AssertionError("encoded and decoded in front of the cache")

    monkeypatch.setattr(int8_cache._NoCache, "update", again)
    cache = live.new_cache(len(own))
    live.read([(cache, own[:-1])])
    live.read([(cache, own[-1:])])
    with pytest.raises(AssertionError, match="in front of the cache"):
        live.llm.model(torch.tensor([own]), use_cache=False)
