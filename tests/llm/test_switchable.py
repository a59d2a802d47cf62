"""Any subset of components runs as if the rest had been removed by hand, and switching leaves no trace."""

import contextlib
import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rap_env.errors import InvalidMask, UnknownName
from rap_env.llm.architecture import ARCHITECTURES
from rap_env.llm.loading import build_tiny_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask, kept_sites
from rap_env.rng import isolated_rng

ATTENTIONS, MLPS = ([f"layer{layer}.{kind}" for layer in range(4)] for kind in ("attention", "mlp"))
DROPPED = [
    ["layer0.attention"],
    ["layer0.mlp"],
    ["layer0.attention", "layer0.mlp"],
    ["layer3.attention", "layer3.mlp"],
    ["layer1.attention", "layer2.attention"],
    ["layer0.attention", "layer1.attention", "layer2.attention"],
    ["layer0.attention", "layer2.attention", "layer1.mlp", "layer3.mlp"],
    MLPS,
    [*ATTENTIONS[1:], *MLPS],
    ["layer0.attention", *MLPS[1:]],
    ATTENTIONS,
    [*ATTENTIONS, *MLPS],
]


def sliding_window_llm() -> SwitchableLLM:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": 257}
    config = AutoConfig.for_model(
        "mistral", sliding_window=4, num_key_value_heads=2, intermediate_size=64, initializer_range=0.2, **sizes
    )
    with isolated_rng(0):
        return SwitchableLLM(AutoModelForCausalLM.from_config(config), None, "sliding")


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "sliding window"])
def llm(request) -> SwitchableLLM:
    return sliding_window_llm() if request.param == "sliding window" else build_tiny_llm(request.param)


@pytest.fixture(scope="module")
def untouched(llm):
    """The same transformers model, never given to a `SwitchableLLM`'s methods."""
    return copy.deepcopy(llm.model)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))


def layers_of(model):
    return (model.model.decoder if model.config.model_type == "opt" else model.model).layers


@contextlib.contextmanager
def removed_by_hand(model, names):
    """Makes the named sub-blocks add zeros to the residual stream: the other way to remove them."""
    handles = []
    for name in names:
        layer = layers_of(model)[int(name.split(".")[0].removeprefix("layer"))]
        if name.endswith("attention"):
            hook = layer.self_attn.register_forward_hook(lambda _, __, out: (torch.zeros_like(out[0]), *out[1:]))
        else:
            last = layer.fc2 if hasattr(layer, "fc2") else layer.mlp
            hook = last.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
        handles.append(hook)
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def mask_without(llm, names) -> PruningMask:
    return PruningMask.all_kept(llm.shape).drop(*names)


@torch.inference_mode()
def logits_of(model, tokens, **inputs) -> torch.Tensor:
    return model(tokens, **inputs).logits


def test_with_everything_kept_the_logits_are_exactly_upstreams(llm, untouched, tokens):
    with llm.pruned(PruningMask.all_kept(llm.shape)):
        assert torch.equal(logits_of(llm.model, tokens), logits_of(untouched, tokens))


@pytest.mark.parametrize("names", DROPPED, ids=len)
def test_a_mask_equals_removing_the_sub_blocks_by_hand(llm, untouched, tokens, names):
    padding = torch.ones_like(tokens)
    padding[0, :3] = 0
    dense = logits_of(untouched, tokens)
    with llm.pruned(mask_without(llm, names)), removed_by_hand(untouched, names):
        expected = logits_of(untouched, tokens)
        assert torch.equal(logits_of(llm.model, tokens), expected)
        padded = logits_of(untouched, tokens, attention_mask=padding)
        assert torch.equal(logits_of(llm.model, tokens, attention_mask=padding), padded)
    assert (expected - dense).abs().max() > 0.01  # so that an ignored mask could not pass


@pytest.mark.parametrize("names", DROPPED[:10], ids=len)
def test_cached_decoding_token_by_token_equals_the_full_forward(llm, untouched, tokens, names):
    with removed_by_hand(untouched, names):
        full = logits_of(untouched, tokens, use_cache=False)
    with llm.pruned(mask_without(llm, names)), torch.inference_mode():
        output = llm.model(tokens[:, :3])
        steps = [output.logits]
        for position in range(3, tokens.shape[1]):
            output = llm.model(tokens[:, position : position + 1], past_key_values=output.past_key_values)
            steps.append(output.logits)
    bound = 2e-5 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 1e-5
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=0, atol=bound)


@pytest.mark.parametrize("names", DROPPED, ids=len)
def test_the_kv_cache_holds_exactly_the_kept_attentions(llm, tokens, names):
    kept = 4 - sum(name.endswith("attention") for name in names)
    with llm.pruned(mask_without(llm, names)), torch.inference_mode():
        cache = llm.model(tokens[:, :3]).past_key_values  # shorter than the sliding window
        if kept == 0:
            assert cache is None
            return
        assert cache.get_seq_length() == 3
        filled = [layer for layer in cache.layers if layer.is_initialized]
    assert len(filled) == kept
    assert all(layer.keys.shape[0] == 2 and layer.keys.shape[2] == 3 for layer in filled)


@pytest.mark.parametrize("names", DROPPED, ids=len)
def test_dropped_components_are_never_called_and_kept_ones_once(llm, tokens, names):
    calls, handles, parts = {}, [], {}
    for index, layer in enumerate(layers_of(llm.model)):
        is_opt = hasattr(layer, "fc1")
        parts[f"layer{index}.attention"] = [
            layer.self_attn,
            layer.self_attn.q_proj,
            layer.self_attn_layer_norm if is_opt else layer.input_layernorm,
        ]
        parts[f"layer{index}.mlp"] = (
            [layer.fc1, layer.fc2, layer.final_layer_norm]
            if is_opt
            else [layer.mlp, layer.mlp.down_proj, layer.post_attention_layernorm]
        )
    for name, modules in parts.items():
        for position, module in enumerate(modules):
            calls[name, position] = 0

            def count(*_, key=(name, position)):
                calls[key] += 1

            handles.append(module.register_forward_hook(count))
    with llm.pruned(mask_without(llm, names)):
        logits_of(llm.model, tokens)
    for handle in handles:
        handle.remove()
    assert calls == {(name, position): int(name not in names) for name, position in calls}


@pytest.mark.parametrize("names", DROPPED, ids=len)
def test_generation_under_a_mask_picks_the_most_likely_token_each_time(llm, untouched, tokens, names):
    expected, end = tokens[:, :4], 255
    with removed_by_hand(untouched, names):
        for _ in range(5):
            logits = logits_of(untouched, expected, use_cache=False)[:, -1].clone()
            logits[:, end] = -torch.inf  # `min_new_tokens` keeps it from ending
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": end, "pad_token_id": 256}
    with llm.pruned(mask_without(llm, names)):
        prompt = {"input_ids": tokens[:, :4], "attention_mask": torch.ones(2, 4, dtype=torch.long)}
        assert torch.equal(llm.model.generate(**prompt, **options), expected)


def traces(llm) -> dict:
    """Everything that switching touches."""
    layers = layers_of(llm.model)
    return {
        "layer_idx": [layer.self_attn.layer_idx for layer in layers],
        "attributes": [sorted(vars(layer)) for layer in layers],
        "hooks": [len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in layers],
        "use_cache": (llm.model.config.use_cache, llm.model.generation_config.use_cache),
        "mask": llm.mask,
    }


@pytest.mark.parametrize("names", [DROPPED[2], ATTENTIONS, [*ATTENTIONS, *MLPS]], ids=len)
def test_switching_leaves_no_trace_also_when_the_body_raises(llm, untouched, tokens, names):
    before = traces(llm)
    assert before["layer_idx"] == [0, 1, 2, 3] and "forward" not in before["attributes"][0]
    with llm.pruned(mask_without(llm, names)):
        assert traces(llm) != before
    assert traces(llm) == before
    with pytest.raises(KeyError, match="body"), llm.pruned(mask_without(llm, names)):
        raise KeyError("body")
    assert traces(llm) == before
    assert torch.equal(logits_of(llm.model, tokens), logits_of(untouched, tokens))


@pytest.mark.parametrize("values", [(False, False), (True, False), (False, True), (True, None)])
def test_the_users_choice_of_caching_survives_switching(values):
    llm = build_tiny_llm()
    llm.model.config.use_cache, llm.model.generation_config.use_cache = values
    for names in (["layer0.mlp"], ATTENTIONS, ["layer0.attention"]):
        with llm.pruned(mask_without(llm, names)):
            inside = (False, False) if names == ATTENTIONS else values
            assert traces(llm)["use_cache"] == inside
        assert traces(llm)["use_cache"] == values
    with llm.pruned(mask_without(llm, ATTENTIONS)):
        with llm.pruned(mask_without(llm, [*ATTENTIONS, *MLPS])):
            assert traces(llm)["use_cache"] == (False, False)
        assert traces(llm)["use_cache"] == (False, False)
    assert traces(llm)["use_cache"] == values


def test_masks_nest_and_each_level_comes_back(llm, tokens):
    outer, inner = mask_without(llm, ["layer0.attention"]), mask_without(llm, ["layer1.mlp", "layer2.attention"])
    with llm.pruned(outer):
        expected, state = logits_of(llm.model, tokens), traces(llm)
        with llm.pruned(inner) as same:
            assert same is llm and llm.mask == inner
            assert not torch.equal(logits_of(llm.model, tokens), expected)
        assert traces(llm) | {"attributes": 0} == state | {"attributes": 0}
        assert torch.equal(logits_of(llm.model, tokens), expected)
    assert llm.mask == PruningMask.all_kept(llm.shape)


def test_an_applied_mask_stays_until_the_next(llm, untouched, tokens):
    try:
        llm.apply(mask_without(llm, ["layer0.attention", "layer3.mlp"]))
        llm.apply(mask_without(llm, ["layer1.mlp"]))
        with removed_by_hand(untouched, ["layer1.mlp"]):
            assert torch.equal(logits_of(llm.model, tokens), logits_of(untouched, tokens))
    finally:
        llm.apply(PruningMask.all_kept(llm.shape))


def test_a_mask_of_another_model_is_refused_and_changes_nothing(llm, untouched, tokens):
    other = PruningMask.all_kept(build_tiny_llm(n_layers=2).shape).drop("layer0.mlp")
    for switch in (llm.apply, lambda mask: llm.pruned(mask).__enter__()):
        with pytest.raises(
            InvalidMask,
            match=r"expected a mask over the 8 components of .*; got one over 4 others: other names, or other",
        ):
            switch(other)
    assert torch.equal(logits_of(llm.model, tokens), logits_of(untouched, tokens))


@pytest.mark.parametrize("names", DROPPED[::3], ids=len)
def test_a_stream_run_site_by_site_equals_the_forward(llm, untouched, tokens, names):
    padding = torch.ones_like(tokens)
    padding[1, :5] = 0
    with torch.inference_mode(), removed_by_hand(untouched, names):
        for inputs in ({}, {"attention_mask": padding}):
            hidden, context = llm.open_stream(tokens, **inputs)
            assert hidden.shape == (2, 12, 32)
            hidden = llm.run(kept_sites(mask_without(llm, names)), hidden, context)
            assert torch.equal(llm.logits(hidden), logits_of(untouched, tokens, **inputs))


def test_a_stream_ignores_the_applied_mask_and_leaves_no_hook(llm, untouched, tokens):
    before = traces(llm)
    with llm.pruned(mask_without(llm, ["layer0.attention", "layer0.mlp"])), torch.inference_mode():
        hidden, context = llm.open_stream(tokens)
        hidden = llm.run(llm.shape.sites, hidden, context)
        assert torch.equal(llm.logits(hidden), logits_of(untouched, tokens))
    with pytest.raises(IndexError):  # no such token
        llm.open_stream(tokens + 1000)
    assert traces(llm) == before


def test_the_digest_tells_weights_apart_and_ignores_the_mask(tiny_llm):
    llm = build_tiny_llm()
    with llm.pruned(mask_without(llm, ["layer0.mlp"])):
        assert llm.digest == tiny_llm.digest
    changed = build_tiny_llm()
    changed.model.lm_head.weight[0, 0] += 1
    by_columns = build_tiny_llm()  # products with it round differently
    by_columns.model.lm_head.weight.data = by_columns.model.lm_head.weight.data.T.contiguous().T
    others = [changed, by_columns, build_tiny_llm(dtype="bfloat16")]
    assert len({tiny_llm.digest, *(llm.digest for llm in others)}) == 4


def test_an_unknown_family_is_refused():
    config = AutoConfig.for_model("gpt2", n_layer=1, n_head=1, n_embd=8, vocab_size=10)
    with pytest.raises(UnknownName, match="unknown model architecture 'gpt2'"):
        SwitchableLLM(AutoModelForCausalLM.from_config(config), None, "gpt2")
