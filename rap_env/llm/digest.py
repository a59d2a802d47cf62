"""A model's digest: equal where models compute the same."""

import hashlib
import json

import torch
from torch import nn

from rap_env.llm.architecture import decoder_layers
from rap_env.llm.int8_cache import in_int8

# Entries of a config that say where it comes from, or what the weights' own types say already.
_ORIGIN = {"_name_or_path", "_model_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}


def weights_digest(model: nn.Module, refits: str = "") -> str:
    """SHA-256 over config, KV format and the names, types and bytes of all weights, hexadecimal.

    Matrices that are stored by columns say so, for products with them round differently.

    Args:
        model: A causal LM.
        refits: What stands in for its output matrices, as a digest.
    """
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in _ORIGIN}
    if in_int8(decoder_layers(model)[0].module.self_attn):
        config["kv_cache"] = "int8"
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        layout = "" if tensor.is_contiguous() else f":{tensor.stride()}"
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}{layout};".encode())
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy())
    digest.update(refits.encode())
    return digest.hexdigest()
