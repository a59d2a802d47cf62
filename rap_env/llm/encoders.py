"""Encoder models with a classification head, and how one is read layer by layer."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from rap_env.errors import ModelUnavailable, UnsupportedArchitecture


def load_encoder(name: str, dtype: str = "float32", device: str = "cpu") -> tuple[nn.Module, object]:
    """Loads an encoder that gives a pair of texts one score, and its tokenizer, from safetensors.

    Args:
        name: A local folder, or a hub name.
        dtype: `"float32"` or `"bfloat16"`.
        device: A torch device.

    Raises:
        ModelUnavailable: There is no such model, or it can't be loaded.
        UnsupportedArchitecture: It has several outputs.
    """
    transformers_logging.disable_progress_bar()
    source = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    try:
        config = AutoConfig.from_pretrained(source)
        if config.num_labels != 1:
            raise UnsupportedArchitecture(f"expected an encoder with 1 output; {name} has {config.num_labels}")
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=getattr(torch, dtype), use_safetensors=True
        )
    except (OSError, ValueError) as error:
        if isinstance(error, UnsupportedArchitecture):
            raise
        raise ModelUnavailable(f"can't load {name!r}: {' '.join(str(error).split())[:200]}") from error
    return model.to(device).eval().requires_grad_(False), tokenizer
