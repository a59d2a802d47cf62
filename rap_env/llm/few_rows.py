"""Decoding on a CPU at the rate at which memory is read: products of a few rows, and attention of one token.

oneDNN lays a bfloat16 matrix out anew for each product of a few rows, which takes longer than the product, and keeps a
program for each shape; torch's attention is made for many queries, and reads an INT8 cache only decoded. The kernels
here (`few_rows.c`) read matrices, keys and values as they lie. They are built when the package is installed, where
there is a C compiler; without them all is torch's.
"""

import torch
from torch import nn

from rap_env.llm.parts import twin
from rap_env.llm.quantised import Int8Linear

try:
    from rap_env.llm import _few_rows
except ImportError:
    _few_rows = None

MOST_ROWS = 4  # with more, oneDNN is as quick
_MOST_THREADS = 2  # a kernel runs on one; more of torch's threads read memory faster than one does
_QUICK = torch.backends.cpu.get_cpu_capability() == "AVX512"  # compiled for AVX2 they were no quicker


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels are there, and quicker than torch in this process as it is now."""
    return (
        _few_rows is not None
        and _QUICK
        and dtype == torch.bfloat16
        and device.type == "cpu"
        and torch.get_num_threads() <= _MOST_THREADS
    )


def for_few_rows(module: nn.Module) -> nn.Module:
    """A layer with the same weights in the same place that multiplies a few rows by the kernel, for inference.

    Args:
        module: What is neither a plain layer of bfloat16 nor one of INT8 with such scales is returned as it is.
    """
    kind = {nn.Linear: FewRows, Int8Linear: FewRowsInt8}.get(type(module))
    if kind is None or (module.weight if kind is FewRows else module.scales).dtype != torch.bfloat16:
        return module
    made = twin(module)
    made.__class__ = kind
    return made


class FewRows(nn.Linear):
    """A linear layer that multiplies at most `MOST_ROWS` rows by the kernel, and sums in float32."""

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


def _product(
    inputs: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """None where there are more rows, or gaps between a matrix' elements both ways."""
    (n, k), strides = weight.shape, weight.stride()
    rows, by_columns = inputs.numel() // k, scales is None and strides[1] != 1
    if rows > MOST_ROWS or strides[0 if by_columns else 1] != 1:
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
        rows,
        n,
        k,
    )
    return outputs


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """What one token reads, [hq, D] -> [hq, D].

    Args:
        query: [hq, D], bfloat16.
        key: [h, T, D], bfloat16, or [h, T, D + 2] as `rap_env.llm.int8_cache.encoded` makes it; T is at least 1. Tokens
            lie side by side. As many query heads read each.
        value: As `key`, with the same strides.
        scale: Of the scores; by default 1 / sqrt(D).
    """
    query, (heads, tokens, _), channels = query.contiguous(), key.shape, query.shape[1]
    read = torch.empty_like(query)
    _few_rows.attend(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        key.stride(0) * key.itemsize,
        key.stride(1) * key.itemsize,
        key.dtype == torch.int8,
        read.data_ptr(),
        heads,
        len(query) // heads,
        channels,
        tokens,
        scale or channels**-0.5,
    )
    return read
