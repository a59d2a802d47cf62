"""What counts as equal, and what is found."""

import pytest
import torch

from rap_env.errors import ExportRefused
from rap_env.export.compare import check_logits, check_model
from rap_env.export.hf import own_model
from rap_env.export.pruned import PrunedModel
from rap_env.mask import PruningMask
from tests.export.cases import MEMBERS, cut_llm

EXPECTED = torch.tensor([[10.0, -20.0, 5.0]])  # the largest is 20


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 0.002), (torch.float16, 0.4), (torch.bfloat16, 1.0)])
def test_logits_may_differ_by_a_share_of_the_largest(dtype, allowed):
    check_logits(EXPECTED + 0.98 * allowed, EXPECTED, dtype, "a reader")
    with pytest.raises(ExportRefused, match=r"read by a reader, does not compute .* logits up to 20 differ by"):
        check_logits(EXPECTED + 1.02 * allowed, EXPECTED, dtype, "a reader")


def test_what_is_no_number_is_not_equal():
    with pytest.raises(ExportRefused, match="differ by nan"):
        check_logits(torch.tensor([[10.0, float("nan"), 5.0]]), EXPECTED, torch.float32, "a reader")


@pytest.fixture
def pruned() -> PrunedModel:
    llm = cut_llm(*MEMBERS["llama, 2 KV heads"])
    return PrunedModel.of(llm, PruningMask.all_kept(llm.shape).drop("layer0.attention", "layer1.mlp"))


def test_a_small_change_of_one_weight_is_found(pruned):
    model = own_model(pruned)
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] += 0.1
    with pytest.raises(ExportRefused, match="read by a reader, does not compute"):
        check_model(model, pruned, "a reader")


def test_a_cache_that_does_not_begin_with_the_first_attention_is_found(pruned):
    model = own_model(pruned)
    check_model(model, pruned, "a reader")
    for layer in model.model.layers[1:]:
        layer.self_attn.layer_idx += 1  # as they were numbered in the unpruned model
    with pytest.raises(ExportRefused, match="read by a reader, with a KV cache, does not compute"):
        check_model(model, pruned, "a reader")
