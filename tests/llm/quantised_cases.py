"""Small models of every family whose sizes INT4 groups divide, and what their quantised weights stand for."""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from rap_env.llm.formats import quantise
from rap_env.llm.loading import build_random_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask

SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 257, "initializer_range": 0.1}
SIZES |= {"max_position_embeddings": 64, "intermediate_size": 192}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
MEMBERS = {
    "llama": ("llama", SIZES | HEADS),
    "llama, tied, biases": (
        "llama",
        SIZES | HEADS | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral, window": ("mistral", SIZES | HEADS | {"sliding_window": 5}),
    "qwen2": ("qwen2", SIZES | {"num_attention_heads": 2, "num_key_value_heads": 2}),
    "qwen3, tied": ("qwen3", SIZES | HEADS | {"tie_word_embeddings": True}),
    "opt": ("opt", SIZES | {"num_attention_heads": 2, "ffn_dim": 192, "word_embed_proj_dim": 128}),
}
TOKENS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))


def build(
    member: str, weights: str = "full", kv_cache: str = "full", granularity: str = "group", dtype: str = "float32"
) -> SwitchableLLM:
    """A member with random weights and biases, quantised."""
    family, sizes = MEMBERS[member]
    whole = build_random_llm(family, sizes, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in whole.model.named_parameters():
        if name.endswith("bias"):  # they begin as zeros, and a lost one would not be seen
            parameter.data = (0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return SwitchableLLM(quantise(whole.model, weights, kv_cache), whole.tokenizer, member, granularity)


def numbers_of(linear: nn.Module) -> torch.Tensor:
    """The weights [N, K] that a quantised layer stands for, read off its tensors by the formula, in float64."""
    if linear.weight.dtype == torch.int8:
        return linear.weight.double() * linear.scales.double()[:, None]
    low, high = (linear.weight & 15).double(), (linear.weight >> 4).double()
    numbers = torch.stack([low, high], 1).permute(0, 1, 3, 2).flatten(0, 2)  # blocks, halves, rows; then inputs
    scales, zeros = linear.scales.double().repeat_interleave(linear.group, 0).permute(2, 1, 0)
    return (numbers - 8) * scales + zeros


def dequantised(llm: SwitchableLLM, granularity: str) -> SwitchableLLM:
    """The same model with plain weights: those that its quantised ones stand for."""
    model = copy.deepcopy(llm.model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "scales"):
                weight = numbers_of(child).to(child.scales.dtype)
                plain = nn.Linear(*weight.shape[::-1], bias=False) if hasattr(child, "cut") else nn.Embedding(1, 1)
                plain.weight = nn.Parameter(weight, requires_grad=False)
                plain.bias = getattr(child, "bias", None)
                setattr(parent, name, plain)
    return SwitchableLLM(model, llm.tokenizer, "dequantised", granularity)


def masks_over(llm: SwitchableLLM, n: int = 6) -> Iterator[PruningMask]:
    """The dense mask, and random ones."""
    generator = torch.Generator().manual_seed(2)
    yield PruningMask.all_kept(llm.shape)
    for _ in range(n):
        yield PruningMask.from_bits(llm.shape, (torch.rand(len(llm.shape.components), generator=generator) < 0.6).int())
