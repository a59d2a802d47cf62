"""With a KV cache in INT8 every attention reads what the cache gives back, and it takes the bytes that rows count."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from rap_env.components import ATTENTION
from rap_env.errors import UnsupportedArchitecture
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.llm.formats import quantise
from rap_env.llm.int8_cache import Int8DynamicLayer, Int8SlidingWindowLayer, decoded, encoded
from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask, kept_sites
from rap_env.memory.footprint import footprint
from rap_env.memory.workload import Workload
from tests.evaluation.scoring_cases import score_continuations
from tests.llm.quantised_cases import MEMBERS, TOKENS, build, masks_over


@pytest.fixture(scope="module", params=MEMBERS)
def llm(request):
    return build(request.param, kv_cache="int8")


def attentive(llm, n: int = 4) -> list[PruningMask]:
    return [m for m in masks_over(llm, n) if any(site.kind == ATTENTION for site in kept_sites(m))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_key_is_127_steps_of_its_own_scale(dtype):
    states = torch.zeros(1, 2, 3, 4)
    states[0, 0, 0] = torch.tensor([12.7, -6.34, 0.04, 0.06])
    states[0, 1, 2] = torch.tensor([127e-3, 1e-3, 0.0, 0.0])
    codes = encoded(states.to(dtype))
    assert codes.dtype == torch.int8 and codes.shape == (1, 2, 3, 4 + dtype.itemsize)
    assert codes[0, 0, 0, :4].tolist() == [127, -63, 0, 1] and codes[0, 1, 2, :4].tolist() == [127, 1, 0, 0]
    step = states.abs().amax(-1, keepdim=True) / 127
    assert (decoded(codes, dtype).float() - states).abs().le(0.51 * step + 2 * torch.finfo(dtype).eps * 12.7).all()
    assert torch.equal(encoded(decoded(codes, dtype)), codes) or dtype == torch.bfloat16


def test_cached_decoding_equals_the_forward_that_has_no_cache(llm):
    for mask in attentive(llm):
        with torch.inference_mode(), llm.pruned(mask):
            full = llm.model(TOKENS, use_cache=False).logits
            output = llm.model(TOKENS[:, :3])
            steps = [output.logits]
            for position in range(3, TOKENS.shape[1]):
                token = TOKENS[:, position : position + 1]
                output = llm.model(token, past_key_values=output.past_key_values)
                steps.append(output.logits)
            # A value that lies between two steps may round either way: few do, and each by one step.
            difference = (torch.cat(steps, 1) - full).abs()
            assert difference.median() < 1e-4 and difference.max() < 0.05


def test_streams_and_packed_trees_read_what_a_cache_would_give_back(llm):
    pairs = [((1, 2, 3), (4, 5)), ((1, 2, 3), (6,)), (tuple(range(20)), (7, 8, 9))]
    for mask in attentive(llm):
        with torch.inference_mode(), llm.pruned(mask):
            stream = next(llm.run_masks([mask], *llm.open_stream(TOKENS)))[1]
            assert torch.equal(llm.logits(stream), llm.model(TOKENS, use_cache=False).logits)
            for (context, rest), (score, _) in zip(pairs, score_continuations(llm, pairs), strict=True):
                logprobs = llm.model(torch.tensor([context + rest])).logits[0].double().log_softmax(-1)
                expected = sum(logprobs[len(context) + i - 1, t].item() for i, t in enumerate(rest))
                assert score == pytest.approx(expected, abs=0.02)


def test_a_full_cache_computes_something_else(llm):
    full = build(llm.name)
    with torch.inference_mode():
        difference = (llm.model(TOKENS).logits - full.model(TOKENS).logits).abs()
    assert 1e-4 < difference.max() < 0.5
    with torch.inference_mode():
        evaluator = PerplexityEvaluator(TOKENS, "toy")
        losses = [-evaluator.evaluate(each).score for each in (llm, full)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], abs=0.05)


def test_the_cache_takes_exactly_the_bytes_that_rows_count(llm):
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 256, "eos_token_id": None}
    for mask in attentive(llm):
        with torch.inference_mode(), llm.pruned(mask):
            inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
            done = llm.model.generate(**inputs, **options, return_dict_in_generate=True)
        filled = [layer for layer in done.past_key_values.layers if layer.is_initialized]
        assert {type(layer) for layer in filled} <= {Int8DynamicLayer, Int8SlidingWindowLayer}
        n_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in filled)
        assert n_bytes == footprint(llm.shape, mask, Workload(2, 9, 3)).kv_cache_bytes  # the last is not read


@pytest.mark.parametrize("member", ["llama", "opt"])
@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_rows_of_the_cache_by_hand_and_of_the_config(member, dtype, itemsize):
    for granularity, n_parts in (("block", 1), ("group", 2)):
        llm = build(member, "int8", "int8", granularity, dtype)
        rows = [row.kv_bytes_per_token for row in llm.shape.components if row.site.kind == ATTENTION]
        assert rows == [2 * 2 * (64 + itemsize) // n_parts] * (2 * n_parts)  # keys and values, 2 heads of 64
        described = ModelShape.from_config(llm.model.config, getattr(torch, dtype), granularity, "int8", "int8")
        assert described == llm.shape


def test_a_cache_of_the_users_own_is_filled_with_int8_or_refused():
    llm = build("llama", kv_cache="int8")
    with torch.inference_mode():
        for cache in (DynamicCache(), DynamicCache(config=llm.model.config)):
            llm.model(TOKENS, past_key_values=cache)
            assert {type(layer) for layer in cache.layers} == {Int8DynamicLayer}
            assert cache.get_seq_length() == 9
            copied = copy.deepcopy(cache)
            copied.crop(-4)
            logits = llm.model(TOKENS[:, 5:], past_key_values=copied).logits
            torch.testing.assert_close(logits, llm.model(TOKENS).logits[:, 5:], rtol=0, atol=0.05)
        with pytest.raises(UnsupportedArchitecture, match=r"expected a dynamic KV cache, .* is a StaticLayer"):
            llm.model(TOKENS, past_key_values=StaticCache(llm.model.config, max_cache_len=32))
        full = build("llama").model(TOKENS).past_key_values
        with pytest.raises(UnsupportedArchitecture, match=r"is a DynamicLayer with tokens in it"):
            llm.model(TOKENS, past_key_values=full)


def test_asking_twice_changes_nothing():
    llm = build("llama", kv_cache="int8")
    before = llm.digest
    quantise(llm.model, kv_cache="int8")
    hooks = [len(layer.self_attn._forward_pre_hooks) for layer in llm.model.model.layers]
    assert hooks == [1, 1] and build("llama", kv_cache="int8").digest == before
