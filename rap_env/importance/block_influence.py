"""Block influence: how much a part of the model turns the residual stream."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import Component


def block_influence(llm: SwitchableLLM, windows: torch.Tensor, parts: Sequence[Sequence[Component]]) -> list[float]:
    """Measures 1 - cosine(hidden state in, hidden state out), mean over all tokens (ShortGPT, arXiv 2403.03853).

    One forward of the dense model measures all parts. In bfloat16 a cosine near 1 would be rounded to steps of 0.004,
    so that parts would tie: cosines are taken in float32.

    Args:
        llm: The model, whatever mask is applied to it.
        windows: Calibration tokens [N, T].
        parts: All components of the model in its own order, grouped: whole layers, or single components.

    Returns:
        The influence of each part, between 0 and 2.

    Raises:
        ValueError: The parts are not all components in model order.
    """
    components = tuple(component for part in parts for component in part)
    if components != llm.shape.components:
        raise ValueError(
            f"expected parts that are the model's {len(llm.shape.components)} components in order;"
            f" got {len(components)} components in {len(parts)} parts"
        )
    hidden, context = llm.open_stream(windows.to(llm.device))
    influences = []
    for part in parts:
        behind = llm.run(part, hidden, context)
        cosine = functional.cosine_similarity(hidden.float(), behind.float(), dim=-1)  # [N, T]
        influences.append(1.0 - cosine.mean().item())
        hidden = behind
    return influences
