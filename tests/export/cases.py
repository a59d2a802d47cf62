"""Small models of every family with masks over their parts, and a tokenizer that GGUF files can hold."""

import json

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from rap_env.llm.loading import build_random_llm
from rap_env.llm.switchable import SwitchableLLM
from tests.llm.test_parts import GROUP, MEMBERS, SIZES, random_masks

__all__ = ["GROUP", "HELD", "MEMBERS", "SIZES", "cut_llm", "llm_with_merges", "merging", "random_masks"]
PAIRS = SIZES | {"num_key_value_heads": 4, "vocab_size": 258}
ROPE = {"rope_theta": 100.0, "factor": 2.0}
LLAMA3_ROPE = ROPE | {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 16}
# What DeciLM and llama.cpp's `deci` can hold.
HELD = {
    "llama": ("llama", PAIRS),
    "llama, tied": ("llama", PAIRS | {"tie_word_embeddings": True}),
    "llama, biases": ("llama", PAIRS | {"attention_bias": True, "mlp_bias": True}),
    "llama, linear positions": ("llama", PAIRS | {"rope_parameters": ROPE | {"rope_type": "linear"}}),
    "llama, positions of Llama 3": ("llama", PAIRS | {"rope_parameters": LLAMA3_ROPE | {"rope_type": "llama3"}}),
    "mistral": ("mistral", PAIRS | {"sliding_window": None}),
    "qwen2": ("qwen2", PAIRS),
}


def cut_llm(family: str, sizes: dict, dtype: str = "float32") -> SwitchableLLM:
    """A random model whose biases are no zeros: otherwise a lost one would not be seen."""
    whole = build_random_llm(family, sizes, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in whole.model.named_parameters():
        if name.endswith("bias"):
            parameter.data = (0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return SwitchableLLM(whole.model, whole.tokenizer, "cut", "group")


def merging(tokenizer: PreTrainedTokenizerFast, **changes) -> PreTrainedTokenizerFast:
    """The byte tokenizer with one merge and the given changes to its JSON; `model` adds to the model's entries."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["model"]["vocab"]["th"] = 257
    data["model"]["merges"] = [["t", "h"]]
    data["model"] |= changes.pop("model", {})
    names = {"bos_token": "<end>", "eos_token": "<end>", "pad_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data | changes)), **names)


def llm_with_merges(family: str, sizes: dict, dtype: str = "float32") -> SwitchableLLM:
    llm = cut_llm(family, sizes, dtype)
    llm.tokenizer = merging(llm.tokenizer)
    return llm
