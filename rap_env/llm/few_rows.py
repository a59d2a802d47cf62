"""Decoding in bfloat16 on a CPU at the rate at which memory is read: products of a few rows, attention of one token.

oneDNN lays a matrix out anew for each product of a few rows, which takes longer than the product, and keeps a program
for each shape; torch's attention is made for many queries. The kernels here (`few_rows.c`) read matrices, keys and
values as they lie. They are built when the package is installed, where there is a C compiler; without them all is
torch's.
"""

import torch
from torch import nn
from torch.nn import functional

from rap_env.llm.parts import twin

try:
    from rap_env.llm import _few_rows
except ImportError:
    _few_rows = None

MOST_ROWS = 4  # with more, oneDNN is as quick
_MOST_THREADS = 2  # a kernel runs on one; more of torch's threads read memory faster than one does


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels are there, and quicker than torch in this process as it is now."""
    return (
        _few_rows is not None
        and dtype == torch.bfloat16
        and device.type == "cpu"
        and torch.get_num_threads() <= _MOST_THREADS
    )


class FewRows(nn.Linear):
    """A linear layer that multiplies at most `MOST_ROWS` rows by the kernel; for inference, no gradient passes."""

    @classmethod
    def of(cls, module: nn.Module) -> nn.Module:
        """A layer with the same weights in the same place; what is no plain layer of bfloat16 is returned as it is."""
        if type(module) is not nn.Linear or module.weight.dtype != torch.bfloat16:
            return module
        made = twin(module)
        made.__class__ = cls
        return made

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N], both bfloat16; summed in float32."""
        weight, bias, k = self.weight, self.bias, inputs.shape[-1]
        n, rows, strides = weight.shape[0], inputs.numel() // k, weight.stride()
        if rows > MOST_ROWS or 1 not in strides:
            return functional.linear(inputs, weight, bias)
        inputs, outputs = inputs.contiguous(), inputs.new_empty(*inputs.shape[:-1], n)
        by_columns = strides[1] != 1
        _few_rows.product(
            weight.data_ptr(),
            strides[1 if by_columns else 0],
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
        query: [hq, D], bfloat16 as all.
        key: [h, T, D], T at least 1; only its first dimension may have gaps. As many query heads read each.
        value: As `key`, with the same strides.
        scale: Of the scores; by default 1 / sqrt(D).
    """
    query, (heads, tokens, channels) = query.contiguous(), key.shape
    read = torch.empty_like(query)
    _few_rows.attend(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        key.stride(0),
        read.data_ptr(),
        heads,
        len(query) // heads,
        channels,
        tokens,
        scale or channels**-0.5,
    )
    return read
