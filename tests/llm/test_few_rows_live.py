"""When the kernels for decoding are used, and what a live model reads with them."""

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.llm import few_rows, parts
from rap_env.llm import live as live_module
from rap_env.llm.few_rows import most_rows
from rap_env.llm.formats import quantise
from rap_env.llm.live import LiveModel
from rap_env.llm.loading import build_random_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.mask import PruningMask
from tests.llm.few_rows_kernels import NATIVE
from tests.llm.test_live_cache import FULL
from tests.llm.test_parts import GROUP, MEMBERS, SIZES

pytestmark = NATIVE


def test_they_are_for_bfloat16_on_a_cpu_with_long_vectors_and_few_threads(monkeypatch):
    cpu = torch.device("cpu")
    for n_threads, rows in {1: 32, 2: 16, 3: 0}.items():
        monkeypatch.setattr(torch, "get_num_threads", lambda n_threads=n_threads: n_threads)
        assert most_rows(cpu, torch.bfloat16) == rows
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert most_rows(cpu, torch.float32) == most_rows(torch.device("cuda"), torch.bfloat16) == 0
    monkeypatch.setattr(few_rows, "_few_rows", None)
    assert most_rows(cpu, torch.bfloat16) == 0


def logits_of_steps(live: LiveModel) -> torch.Tensor:
    """Of two sequences: a prompt of each, two tokens more, and with a narrower mask one of the second."""
    caches = [live.new_cache(16), live.new_cache(16)]
    steps = [live.read([(caches[0], range(3, 12)), (caches[1], [7])])]
    for token in (5, 6):
        steps.append(live.read([(cache, [token]) for cache in caches]))
    live.switch(PruningMask.from_widths(live.llm.shape, [1] * len(live.llm.shape.sites)))
    caches[1].switch(live.heads)
    steps.append(live.read([(caches[1], [9])]))
    return torch.cat(steps).double()


@pytest.mark.parametrize("member", FULL)
@pytest.mark.parametrize(("stored", "numbers"), [(False, "full"), (True, "full"), (False, "int8"), (True, "int8")])
def test_a_live_model_decodes_with_them_and_rounds_about_as_torch_does(member, stored, numbers, monkeypatch, tmp_path):
    monkeypatch.setattr(parts, "GROUP_CHANNELS", GROUP)
    monkeypatch.setenv("RAP_CACHE", str(tmp_path))
    plain, found = build_random_llm(*MEMBERS[member], dtype="bfloat16"), {}
    n_matrices = sum(isinstance(module, nn.Linear) for module in plain.model.modules())
    exact = quantise(copy.deepcopy(plain.model).float(), numbers, numbers)
    rounded = quantise(plain.model, numbers, numbers)
    calls, kernels = Counter(), few_rows._few_rows
    counted = SimpleNamespace(
        **{
            name: lambda *given, name=name: (calls.update([name]), getattr(kernels, name)(*given))
            for name in ("product", "attend", "norm", "rotate")
        }
    )
    for name, model, ours in (("float32", exact, None), ("torch", rounded, None), ("kernels", rounded, counted)):
        monkeypatch.setattr(few_rows, "_few_rows", ours)
        llm = SwitchableLLM(model, plain.tokenizer, "few", "group")
        if stored:
            WeightStore(llm)
        found[name] = logits_of_steps(LiveModel(llm))
        llm.weights_changed()
    errors = {name: (found[name] - found["float32"]).abs().mean() for name in ("torch", "kernels")}
    assert 0 < errors["kernels"] < 1.5 * errors["torch"]
    n_layers, steps = plain.model.config.num_hidden_layers, 4
    n_norms = sum(hasattr(module, "variance_epsilon") for module in plain.model.modules())
    n_products = 4 + steps * (n_matrices - 1)  # one of the head for each
    n_turned = 0 if member.startswith("opt") else 8 * n_layers
    assert calls == Counter(product=n_products, attend=4 * n_layers, norm=steps * max(0, n_norms - 1), rotate=n_turned)


@pytest.mark.parametrize(
    ("most", "expected"), [(32, [1, 4, 5, 16, 17, 31, 32, 64]), (4, [1, 4, 16, 16, 32, 32, 32, 64])]
)
def test_no_rows_are_filled_up_where_they_have_a_kernel(most, expected, monkeypatch):
    monkeypatch.setattr(live_module, "most_rows", lambda _device, _dtype: most)
    live, rows = LiveModel(build_random_llm("llama", SIZES, dtype="bfloat16")), []
    forward = live._forward
    monkeypatch.setattr(
        live, "_forward", lambda inputs, stream: rows.append(inputs.shape[1]) or forward(inputs, stream)
    )
    for n_tokens in (1, 4, 5, 16, 17, 31, 32, 33):
        live.read([(live.new_cache(n_tokens), [3] * n_tokens)])
    assert rows == expected


@pytest.mark.parametrize(
    ("most", "expected"), [(32, [1, 32, 64, 128]), (4, [1, 4, 16, 32, 64, 128]), (0, [1, 4, 16, 64, 128])]
)
def test_warming_up_reads_once_in_each_number_of_rows_with_a_program(most, expected, monkeypatch):
    monkeypatch.setattr(live_module, "most_rows", lambda _device, _dtype: most)
    live, rows = LiveModel(build_random_llm("llama", SIZES, dtype="bfloat16")), []
    forward, mask = live._forward, live.llm.mask
    monkeypatch.setattr(
        live, "_forward", lambda inputs, stream: rows.append(inputs.shape[1]) or forward(inputs, stream)
    )
    live.warm_up(100, [], 120)
    prompts, longest, next_tokens = rows[: len(expected)], rows[len(expected)], rows[len(expected) + 1 :]
    assert prompts == expected and longest == 128
    assert next_tokens == [size for size in expected if size in live._few_rows and size >= most]
    assert live.llm.mask == mask


@pytest.mark.parametrize("member", FULL)
def test_no_score_depends_on_whether_the_kernels_were_built(member, monkeypatch):
    llm = build_random_llm(*MEMBERS[member], dtype="bfloat16")
    evaluator = PerplexityEvaluator(torch.arange(60).view(3, 20), "toy text")
    masks, scores = [PruningMask.all_kept(llm.shape), PruningMask.all_kept(llm.shape).drop("layer1.mlp")], []
    for kernels in (few_rows._few_rows, None):
        monkeypatch.setattr(few_rows, "_few_rows", kernels)
        outcomes = dict(evaluator.evaluate_many(llm, masks))
        scores.append([outcomes[mask].score for mask in masks])
    assert scores[0] == scores[1]
