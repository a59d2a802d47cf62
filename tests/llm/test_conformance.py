"""Every member of every family computes, caches, generates and scores what upstream does, dense and pruned.

Upstream's side is a model of its own in which a dropped site is one whose output projection is zero. What can't be run
so is refused by its config.
"""

import copy
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rap_env.errors import RapError
from rap_env.evaluation.lm import RapLM
from rap_env.llm import loading
from rap_env.llm.architecture import ARCHITECTURES
from rap_env.llm.loading import build_tiny_llm, load_llm
from rap_env.llm.packing import TokenTree
from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.workload import Workload
from rap_env.rng import isolated_rng
from tests.llm.conformance_cases import FAMILIES, MEMBERS, REFUSED, ROPES, ROPES_REFUSED

CONTEXT = 48


def words(family: str, entries: dict) -> str:
    return f"{family} {json.dumps(entries)}"


class Member:
    """A random member of a family in a folder, as we load it and as upstream does."""

    def __init__(self, family: str, entries: dict, folder: Path) -> None:
        self.family = FAMILIES[family]
        config = AutoConfig.for_model(family, **{**self.family.sizes, **copy.deepcopy(entries)})
        with isolated_rng(0), torch.no_grad():
            self.built = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            for parameter in self.built.parameters():
                if parameter.dim() == 1:  # upstream begins with biases of zero and norms of one
                    parameter.add_(0.3 * torch.randn_like(parameter))
        self.built.save_pretrained(folder)
        build_tiny_llm().tokenizer.save_pretrained(folder)
        self.llm = load_llm(str(folder), dtype="float32", device="cpu")
        bits = product([True, False], repeat=len(self.llm.shape.components))
        self.masks = [PruningMask(self.llm.shape.components, keep) for keep in bits][::3]  # first dense, last nothing

    @property
    def few_masks(self) -> list[PruningMask]:
        """Dense, without the first attention, without an MLP, without any attention, without anything."""
        attentions = [f"layer{layer}.attention" for layer in range(self.llm.shape.n_layers)]
        drops = [[], attentions[:1], ["layer0.mlp"], attentions]
        return [*(self.masks[0].drop(*names) for names in drops), self.masks[-1]]

    def zeroed(self, mask: PruningMask) -> torch.nn.Module:
        """Upstream's model with the dropped components' outputs at zero."""
        model, modules = copy.deepcopy(self.built), {}
        for name, module in model.named_modules():
            modules[name.partition("layers.")[2]] = module
        paths = {"attention": self.family.attention_output, "mlp": self.family.mlp_output}
        for component in mask.dropped:
            for parameter in modules[f"{component.site.layer}.{paths[component.site.kind]}"].parameters():
                parameter.data.zero_()
        return model


@pytest.fixture(scope="module", params=MEMBERS, ids=lambda case: words(*case))
def member(request, tmp_path_factory) -> Member:
    return Member(*request.param, tmp_path_factory.mktemp("member"))


@pytest.fixture
def refuse(tmp_path) -> Callable[[str, dict], str]:
    """Loads a folder with a config and no weights at all; returns the refusal's words."""

    def load(family: str, entries: dict) -> str:
        config = {"model_type": family, **FAMILIES[family].sizes, **entries}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").touch()
        with pytest.raises(RapError) as error:
            load_llm(str(tmp_path), dtype="float32")
        return str(error.value)

    return load


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def test_every_family_and_every_type_of_rotary_positions_is_tried():
    assert set(FAMILIES) == {family for family, _ in MEMBERS} == set(ARCHITECTURES)
    assert {*ROPES, *ROPES_REFUSED} == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize(("family", "entries", "message"), REFUSED, ids=map(str, REFUSED))
def test_what_can_not_be_run_as_upstream_does_is_refused_by_its_config(refuse, monkeypatch, family, entries, message):
    for costly in (loading.AutoTokenizer, loading.AutoModelForCausalLM):
        monkeypatch.setattr(costly, "from_pretrained", lambda *_, **__: pytest.fail("read more than the config"))
    said = refuse(family, entries)
    assert "\n" not in said
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)


def test_a_member_comes_back_from_its_folder_as_it_was_built(member):
    saved, loaded = member.built.state_dict(), member.llm.model.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert member.llm.shape == ModelShape.from_config(member.llm.model.config, torch.float32)
    assert member.llm.shape == ModelShape.from_model(member.built)
    text = tokens(2, 20)
    assert torch.equal(member.llm.model(text).logits, member.built(text).logits)


@torch.inference_mode()
def test_logits_are_upstreams_in_a_batch_and_packed_by_length(member):
    llm, text = member.llm, tokens(2, 20)
    batch = dict(llm.run_masks(member.masks, *llm.open_stream(text)))
    trees = [TokenTree(tuple(row)) for row in (text[0, :3].tolist(), *text.tolist())]
    hidden, context, _packing = llm.open_packed(trees)
    packed = dict(llm.run_masks(member.masks, hidden, context))
    for mask in member.masks:
        expected = member.zeroed(mask)(text, use_cache=False).logits
        torch.testing.assert_close(llm.logits(batch[mask]), expected, atol=1e-4, rtol=1e-4)
        in_trees = torch.cat([expected[0, :3], *expected])
        torch.testing.assert_close(llm.logits(packed[mask])[0], in_trees, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("prompt", "generated"), [(3, 4), (20, 0)])
@torch.inference_mode()
def test_bytes_are_those_of_upstreams_parameters_and_cache(member, prompt, generated):
    text, llm = tokens(2, prompt + generated), member.llm

    def cached(model) -> list[int]:
        cache = model(text[:, :prompt], use_cache=True).past_key_values
        for position in range(prompt, prompt + generated):
            cache = model(text[:, position : position + 1], past_key_values=cache).past_key_values
        layers = cache.layers if cache is not None else []
        return [layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.is_initialized]

    by_layer = cached(member.built)
    paths = {name: parameter.nbytes for name, parameter in member.built.named_parameters()}  # a tied one once
    for mask in member.few_masks:
        needed = footprint(llm.shape, mask, Workload(2, prompt, generated))
        kept = [component.site.layer for component in mask.kept if component.site.kind == "attention"]
        with llm.pruned(mask):
            assert needed.kv_cache_bytes == sum(by_layer[layer] for layer in kept) == sum(cached(llm.model))
        dropped = [
            size
            for component in mask.dropped
            for name, size in paths.items()
            if f"layers.{component.site.layer}." in name
            and "norm" not in name.replace("q_norm", "").replace("k_norm", "")
            and ("self_attn." in name) == (component.site.kind == "attention")
        ]
        assert needed.weights_bytes == sum(paths.values()) - sum(dropped)


@pytest.mark.parametrize(("prompt", "masks"), [(3, (1, 3)), (12, (0, 1))])
@torch.inference_mode()
def test_greedy_generation_with_a_cache_is_upstreams_without_one(member, prompt, masks):
    text = tokens(2, prompt, seed=1)
    options = {"attention_mask": torch.ones_like(text), "max_new_tokens": 4, "do_sample": False}
    own_cache = member.llm.shape.attention_window == 1  # where upstream itself says something else with a cache
    for mask in [member.few_masks[index] for index in masks]:
        expected = member.zeroed(mask).generate(text, use_cache=own_cache, **options)
        with member.llm.pruned(mask):
            generated = member.llm.model.generate(text, use_cache=True, **options)
        assert expected.shape == (2, prompt + 4) and torch.equal(generated, expected)


def test_scores_are_lm_evals_also_where_contexts_are_longer_than_window_and_model(member):
    text = tokens(400, seed=2).tolist()
    requests = [
        (("", ""), text[start : start + context], text[start + 100 : start + 100 + continuation])
        for start, context, continuation in [(0, 1, 1), (0, 9, 2), (0, 9, 4), (7, 30, 1), (9, 45, 5), (11, 90, 6)]
    ]
    ours = RapLM(pretrained=member.llm)
    assert ours.max_length == CONTEXT
    for mask in member.few_masks[:2]:
        theirs = HFLM(pretrained=member.zeroed(mask), tokenizer=member.llm.tokenizer, batch_size=1)
        expected = theirs._loglikelihood_tokens(requests, disable_tqdm=True)
        with member.llm.pruned(mask):
            scores = ours._loglikelihood_tokens(requests)
        assert [score for score, _ in scores] == pytest.approx([score for score, _ in expected], abs=1e-4)
        assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
