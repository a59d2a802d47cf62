"""Decoding on a CPU at the rate at which memory is read: products of a few rows, attention of one token, and norms.

oneDNN lays a bfloat16 matrix out anew for each product of a few rows, which takes longer than the product, and keeps a
program for each shape; torch's attention is made for many queries, and reads an INT8 cache only decoded; and what lies
between the products takes ten of torch's operations for each norm and as many for rotary positions. The kernels here
(`few_rows.c`) read matrices, keys and values as they lie. They are built for AVX-512 and for AVX2 when the package is
installed, where there is a C compiler; without them all is torch's.
"""

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch
from torch import nn

from rap_env.llm.parts import twin
from rap_env.llm.quantised import Int8Linear


def built_for(vectors: str) -> ModuleType | None:
    """The kernels for `AVX512` or `AVX2`, which the processor must have; None where they were not built."""
    try:
        return import_module(f"rap_env.llm._few_rows_{vectors.lower()}")
    except ImportError:
        return None


_few_rows = built_for(torch.backends.cpu.get_cpu_capability())
_PAIRS = _few_rows is not None and bool(_few_rows.PAIRS)  # the processor multiplies pairs of bfloat16 numbers
_MOST_THREADS = 2  # a kernel runs on one; more of torch's threads read memory faster than one does
_MOST_ROWS = 32  # with more, the libraries on one thread are as quick
_FEW_NUMBERS = 2**15  # of all rows; torch's threads don't share so few


def most_rows(device: torch.device, dtype: torch.dtype) -> int:
    """How many rows the kernels multiply quicker than torch in this process as it is now; 0 where they can't at all."""
    n_threads = torch.get_num_threads()
    if _few_rows is None or dtype != torch.bfloat16 or device.type != "cpu" or n_threads > _MOST_THREADS:
        return 0
    return _MOST_ROWS // n_threads


def for_few_rows(module: nn.Module) -> nn.Module:
    """A layer or RMS norm with the same weights in the same place that computes by the kernels, for inference.

    Args:
        module: What is neither a plain layer or RMS norm of bfloat16 nor a layer of INT8 with such scales is returned
            as it is.
    """
    kind = FewRowsNorm if hasattr(module, "variance_epsilon") else _KINDS.get(type(module))
    if kind is None or (module.scales if kind is FewRowsInt8 else module.weight).dtype != torch.bfloat16:
        return module
    made = twin(module)
    made.__class__ = kind
    return made


class FewRows(nn.Linear):
    """A linear layer that multiplies by the kernel, and sums in float32."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N], both bfloat16."""
        outputs = _product(inputs, self.weight, None, self.bias)
        return super().forward(inputs) if outputs is None else outputs


class FewRowsInt8(Int8Linear):
    """An INT8 layer that does."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N], both bfloat16."""
        outputs = _product(inputs, self.weight, self.scales, self.bias)
        return super().forward(inputs) if outputs is None else outputs


class FewRowsNorm(nn.Module):
    """An RMS norm with a model's weight and `variance_epsilon`; sums of squares are in another order than torch's."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H], both bfloat16."""
        hidden = hidden.contiguous()
        normed, size = torch.empty_like(hidden), hidden.shape[-1]
        pointers = (tensor.data_ptr() for tensor in (hidden, self.weight, normed))
        _few_rows.norm(*pointers, hidden.numel() // size, size, self.variance_epsilon)
        return normed


_KINDS = {nn.Linear: FewRows, Int8Linear: FewRowsInt8}


def _product(
    inputs: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """None where there are gaps between a matrix' elements both ways."""
    (n, k), strides = weight.shape, weight.stride()
    by_columns = scales is None and strides[1] != 1
    if strides[0 if by_columns else 1] != 1:
        return None
    inputs, outputs = inputs.contiguous(), inputs.new_empty(*inputs.shape[:-1], n)
    _few_rows.product(
        weight.data_ptr(),
        strides[1 if by_columns else 0] * weight.itemsize,
        0 if scales is None else scales.data_ptr(),
        by_columns,
        0 if bias is None else bias.data_ptr(),
        inputs.data_ptr(),
        outputs.data_ptr(),
        inputs.numel() // k,
        n,
        k,
        _PAIRS,
    )
    return outputs


def attend(
    query: torch.Tensor, caches: Sequence[tuple[torch.Tensor, int]], new: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """What one new token of each of S sequences reads of its own sequence, [S, hq, D] -> [S, hq, D].

    Args:
        query: [S, hq, D], bfloat16.
        caches: For each sequence its keys and values [2, h, capacity, D], bfloat16, or [2, h, capacity, D + 2] as
            `rap_env.llm.int8_cache.encoded` makes them, without gaps, and how many tokens are in front of the new one.
            As many query heads read each KV head.
        new: Keys and values of the new tokens [2, h, S, D], bfloat16, which are written into the caches first; None
            where they are there.
        scale: Of the scores; by default 1 / sqrt(D).
    """
    query, states = query.contiguous(), caches[0][0]
    read, channels, heads = torch.empty_like(query), query.shape[2], states.shape[1]
    new = None if new is None else new.contiguous()
    _few_rows.attend(
        query.data_ptr(),
        0 if new is None else new.data_ptr(),
        read.data_ptr(),
        tuple(number for own, length in caches for number in (own.data_ptr(), own.shape[2], length)),
        states.dtype == torch.int8,
        _PAIRS,
        heads,
        query.shape[1] // heads,
        channels,
        scale or channels**-0.5,
    )
    return read


def rotates(states: torch.Tensor, cos: torch.Tensor) -> bool:
    """Whether `rotated` takes them, and takes less time than torch: it runs on one thread."""
    return (
        _few_rows is not None
        and states.dtype == torch.bfloat16
        and states.device.type == "cpu"
        and cos.shape[:2] == states.shape[:2]
        and (states.numel() <= _FEW_NUMBERS or torch.get_num_threads() == 1)
    )


def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """What `rap_env.llm.kernels.rotated` does, with the same bits."""
    states, cos, sin = states.contiguous(), cos.contiguous(), sin.contiguous()
    turned, (heads, channels) = torch.empty_like(states), states.shape[2:]
    pointers = (tensor.data_ptr() for tensor in (states, cos, sin, turned))
    _few_rows.rotate(*pointers, states.numel() // (heads * channels), heads, channels // 2)
    return turned
