"""Compares what a reader of an export computes with the masked model."""

import torch
from torch import nn

from rap_env.errors import ExportRefused
from rap_env.export.pruned import PrunedModel

# Largest difference of a logit, as a share of the largest logit: rounding of matrices that are multiplied in another
# order. Readers that run the same kernels on the same matrices differ by nothing at all in float32.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def check_logits(logits: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, reader: str) -> None:
    """Refuses logits that are not those of the masked model.

    Args:
        logits: What was read and computed, of the expected one's shape.
        expected: What the masked model gives.
        dtype: Type of the weights, which decides the tolerance.
        reader: Who computed it, for the message.

    Raises:
        ExportRefused: They differ by more than `TOLERANCE`, or are no numbers.
    """
    difference, largest = (logits.float().cpu() - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= TOLERANCE[dtype] * largest:  # also where it is not a number
        raise ExportRefused(
            f"the export, read by {reader}, does not compute what the masked model does: logits up to {largest:.3g}"
            f" differ by {difference:.3g}, expected at most {TOLERANCE[dtype]:g} of that; nothing was written"
        )


def check_model(model: nn.Module, pruned: PrunedModel, reader: str) -> None:
    """Refuses a model that differs from the masked one, at once or when it decodes with its KV cache."""
    tokens = pruned.tokens.to(model.device)
    with torch.inference_mode():
        check_logits(model(tokens, use_cache=False).logits, pruned.logits, pruned.dtype, reader)
        if not model.config.use_cache:
            return
        cache, steps = None, []
        for part in tokens.split([tokens.shape[1] - 4, 1, 1, 2], dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        check_logits(torch.cat(steps, 1), pruned.logits, pruned.dtype, f"{reader}, with a KV cache")
