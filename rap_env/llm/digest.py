"""A model's digest: equal where models compute the same."""

import hashlib
import json

import torch
from torch import nn

# Entries of a config that say where it comes from, or what the weights' own types say already.
_ORIGIN = {"_name_or_path", "_model_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}


def weights_digest(model: nn.Module, refits: str = "") -> str:
    """SHA-256 over the config and the names, types and bytes of all weights, hexadecimal.

    Args:
        model: A causal LM.
        refits: What stands in for its output matrices, as a digest.
    """
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in _ORIGIN}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy())
    digest.update(refits.encode())
    return digest.hexdigest()
