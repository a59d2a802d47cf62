"""Folders with a small random model, and changes that make its files and its config disagree."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rap_env.errors import ModelUnavailable
from rap_env.llm.loading import load_llm

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": 257, "head_dim": 8}
SIZES |= {"intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.2}
OPT_SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 257, "ffn_dim": 64}
OPT_SIZES |= {"init_std": 0.2, "max_position_embeddings": 64}
QUERY, KEY = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict], object], file: str = "model.safetensors") -> None:
    weights = load_file(folder / file)
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / file, {"format": "pt"})


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def refusal(folder: Path, kind: type[Exception] = ModelUnavailable) -> str:
    with pytest.raises(kind) as error:
        load_llm(str(folder), dtype="float32")
    assert "\n" not in str(error.value)
    return str(error.value)
