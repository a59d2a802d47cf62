"""Masks over parts of sites: exactly the model whose weights were cut by hand, in every way of running it."""

import copy
import itertools

import pytest
import torch

from rap_env.components import ATTENTION, MLP, Site
from rap_env.llm import parts
from rap_env.llm.architecture import ARCHITECTURES
from rap_env.llm.loading import build_random_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask, kept_sites
from rap_env.memory.footprint import footprint
from rap_env.memory.workload import Workload
from tests.evaluation.scoring_cases import score_continuations

GROUP = 24  # of 64 channels: parts of 16, 24 and 24
SIZES = {"hidden_size": 32, "num_attention_heads": 8, "num_hidden_layers": 3, "vocab_size": 257}
SIZES |= {"initializer_range": 0.2, "intermediate_size": 64, "max_position_embeddings": 64}
OPT = SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32}
MEMBERS = {
    "llama, 2 KV heads": ("llama", SIZES | {"num_key_value_heads": 2}),
    "llama, as many KV heads": ("llama", SIZES | {"num_key_value_heads": 8}),
    "llama, biases": ("llama", SIZES | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "mistral, window": ("mistral", SIZES | {"num_key_value_heads": 4, "sliding_window": 5}),
    "qwen2": ("qwen2", SIZES | {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", SIZES | {"num_key_value_heads": 2, "head_dim": 6}),
    "opt": ("opt", OPT),
    "opt without biases": ("opt", OPT | {"enable_bias": False}),
}
TOKENS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def small_groups():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "GROUP_CHANNELS", GROUP)
        yield


@pytest.fixture(scope="module", params=MEMBERS)
def llm(request, small_groups) -> SwitchableLLM:
    family, sizes = MEMBERS[request.param]
    whole = build_random_llm(family, sizes)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in whole.model.named_parameters():
        if name.endswith("bias"):  # they begin as zeros, and a lost one would not be seen
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return SwitchableLLM(whole.model, whole.tokenizer, "cut", "group")


def random_masks(llm: SwitchableLLM, n: int = 12) -> list[PruningMask]:
    generator, shape = torch.Generator().manual_seed(2), llm.shape
    shares = torch.rand(n, len(shape.sites), generator=generator)
    masks = []
    for row in shares:
        share = dict(zip(shape.sites, (1.4 * row - 0.2).tolist(), strict=True))
        draws = torch.rand(len(shape.components), generator=generator).tolist()
        bits = [draw < share[row.site] for draw, row in zip(draws, shape.components, strict=True)]
        masks.append(PruningMask.from_bits(shape, bits))
    return [PruningMask.all_kept(shape), *masks]


def cut_by_hand(llm: SwitchableLLM, mask: PruningMask) -> torch.nn.Module:
    """A copy of the model in which what the dropped channels would add is zero, and that of lost sites altogether."""
    model = copy.deepcopy(llm.model)
    layers = model.model.decoder.layers if llm.shape.model_type == "opt" else model.model.layers
    for site, bits in mask.kept_parts:
        layer = layers[site.layer]
        if llm.shape.model_type == "opt":
            output = layer.self_attn.out_proj if site.kind == ATTENTION else layer.fc2
        else:
            output = layer.self_attn.o_proj if site.kind == ATTENTION else layer.mlp.down_proj
        head = output.in_features // len(bits)
        bounds = [0, 16, 40, 64] if site.kind == MLP else range(0, output.in_features + 1, head)
        for (start, end), bit in zip(itertools.pairwise(bounds), bits, strict=True):
            if not bit:
                output.weight.data[:, start:end] = 0.0
        if not any(bits) and output.bias is not None:
            output.bias.data.zero_()
    return model


def test_rows_count_every_weight_once_and_are_named_by_heads_and_channels(llm):
    total = sum(parameter.nbytes for parameter in llm.model.parameters())
    assert llm.shape.weight_bytes == total
    names = [component.name for component in llm.shape.components if component.site == Site(1, MLP)]
    assert names == ["layer1.mlp.0:16", "layer1.mlp.16:40", "layer1.mlp.40:64"]
    heads = [component for component in llm.shape.components if component.site == Site(2, ATTENTION)]
    n_heads = getattr(llm.model.config, "num_key_value_heads", 8)
    assert [component.name for component in heads] == [f"layer2.attention.{index}" for index in range(n_heads)]
    assert len({component.weight_bytes for component in heads}) == 1
    first, _, last = (component.weight_bytes for component in llm.shape.components if component.site == Site(1, MLP))
    assert first * 24 == last * 16
    by_config = llm.shape.from_config(llm.model.config, torch.float32, "group")
    assert by_config == llm.shape


def test_masked_logits_are_those_of_the_model_cut_by_hand(llm):
    masks = random_masks(llm)
    streams = dict(llm.run_masks(masks, *llm.open_stream(TOKENS)))
    for mask in masks:
        with torch.inference_mode():
            expected = cut_by_hand(llm, mask)(TOKENS).logits
            with llm.pruned(mask):
                assert torch.allclose(llm.model(TOKENS).logits, expected, atol=2e-5)
            assert torch.allclose(llm.logits(streams[mask]), expected, atol=2e-5)
    assert sum(site.parts is not None for mask in masks for site in kept_sites(mask)) > 20


def test_together_is_exactly_alone_and_dense_is_exactly_upstreams(llm):
    masks = random_masks(llm)
    with torch.inference_mode():
        opened = llm.open_stream(TOKENS)
        for mask, stream in llm.run_masks(masks, *opened):
            assert torch.equal(stream, next(llm.run_masks([mask], *opened))[1])
        assert torch.equal(llm.model(TOKENS).logits, llm.logits(next(llm.run_masks(masks[:1], *opened))[1]))


def test_cached_generation_and_the_cache_are_those_of_the_smaller_model(llm):
    work = Workload(2, 9)
    for mask in random_masks(llm):
        if not any(site.kind == ATTENTION for site in kept_sites(mask)):
            continue
        hand = cut_by_hand(llm, mask)
        with torch.inference_mode(), llm.pruned(mask):
            ours = llm.model.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=256, eos_token_id=None)
            theirs = TOKENS
            for _ in range(6):
                theirs = torch.cat([theirs, hand(theirs, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            assert torch.equal(ours, theirs)
            cache = llm.model(TOKENS, use_cache=True).past_key_values
            n_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)
        assert n_bytes == footprint(llm.shape, mask, work).kv_cache_bytes


def test_packed_trees_are_scored_as_by_the_smaller_model(llm):
    pairs = [((1, 2, 3), (4, 5)), ((1, 2, 3), (6,)), (tuple(range(20)), (7, 8, 9)), ((9,), (1, 1))]
    for mask in random_masks(llm, 5):
        hand = cut_by_hand(llm, mask)
        with torch.inference_mode(), llm.pruned(mask):
            scores = [score for score, _ in score_continuations(llm, pairs)]
            for (context, continuation), score in zip(pairs, scores, strict=True):
                logprobs = hand(torch.tensor([context + continuation])).logits[0].double().log_softmax(-1)
                expected = sum(logprobs[len(context) + i - 1, t].item() for i, t in enumerate(continuation))
                assert score == pytest.approx(expected, abs=1e-4)


def test_parts_side_by_side_are_views_and_others_copies(llm):
    weights = [p for p in llm.model.parameters() if p.ndim == 2]
    own = {p.untyped_storage().data_ptr() for p in weights}
    for bits, shared in (((1, 0, 0), True), ((1, 1, 0), True), ((0, 1, 1), True), ((1, 0, 1), False)):
        rows = [row for row in llm.shape.components if row.site == Site(1, MLP)]
        dropped = [row for row, bit in zip(rows, bits, strict=True) if not bit]
        mask = PruningMask.all_kept(llm.shape).drop(*dropped)
        (site,) = (site for site in kept_sites(mask) if site.parts is not None)
        layer = llm.layer_of(site)
        matrices = [p for module in layer.modules_of(MLP) for p in module.parameters() if p.ndim == 2]
        assert all((p.untyped_storage().data_ptr() in own) == shared for p in matrices) and len(matrices) in (2, 3)


def test_the_first_and_the_last_attention_may_lose_heads_of_their_own(llm):
    shape = llm.shape
    heads = [c for c in shape.components if c.site.kind == ATTENTION]
    by_layer = [list(group) for _, group in itertools.groupby(heads, key=lambda c: c.site.layer)]
    mask = PruningMask.all_kept(shape).drop(*by_layer[0], by_layer[1][0], by_layer[2][-1])
    work = Workload(2, 9, 3)
    per_head = heads[0].kv_bytes_per_token
    kept = 2 * (len(by_layer[0]) - 1)
    assert footprint(shape, mask, work).kv_cache_bytes == kept * per_head * work.cached_tokens(shape.attention_window)


def test_every_family_is_among_the_members():
    assert {family for family, _ in MEMBERS.values()} == set(ARCHITECTURES)
