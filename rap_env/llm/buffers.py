"""Memory that a thread uses again for what lives as long as one product: new memory would be page faults each time."""

import math
import threading

import torch

_HERE = threading.local()  # `buffers` by purpose, type and device


def buffer(purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of the thread's own, valid until the thread's next call for the same purpose, type and device."""
    buffers = _HERE.__dict__.setdefault("buffers", {})
    size, key = math.prod(shape), (purpose, dtype, device)
    if key not in buffers or len(buffers[key]) < size:
        with torch.inference_mode(False):  # so that it can be written to in any mode
            buffers[key] = torch.empty(size, dtype=dtype, device=device)
    return buffers[key][:size].view(shape)
