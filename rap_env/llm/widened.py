"""Products of bfloat16 matrices by way of float32, on processors without instructions for bfloat16.

There oneDNN and torch take several times as long for them as for products in float32. Each bfloat16 number is one
in float32 too, and the products of two are exact there, so the results are the same but for the order of sums: sums
are in float32 either way, and rounded once.

Shapes: R rows, N outputs, K inputs.
"""

import contextlib
import functools
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rap_env.llm.buffers import buffer

_FEW_ROWS = 4  # with fewer, as in decoding, torch's own operations take less time
_TILE_ROWS = 512
_TILE_WEIGHTS = 2**20  # that are widened at once


def widens(like: Any) -> bool:
    """Whether products of such a type are quicker by way of float32 on such a device.

    Args:
        like: A tensor or model; has `dtype` and `device`.
    """
    return like.dtype == torch.bfloat16 and like.device.type == "cpu" and not multiplies_bfloat16()


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16; those that are not x86 were not tried and count as such."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def has_few_rows(inputs: torch.Tensor) -> bool:
    """Whether torch's own operations are the quicker ones for inputs [..., K]."""
    return inputs.numel() < _FEW_ROWS * inputs.shape[-1]


def widened(
    inputs: torch.Tensor,
    layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    finished: Callable[..., torch.Tensor] = lambda _place, product: product,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """What is made of products of the same inputs with one or more layers, [..., K] -> [..., N], tile by tile.

    Args:
        inputs: [..., K], bfloat16.
        layers: Of each its weights [N, K] and biases [N], bfloat16; None for no biases.
        finished: Gets the place of a tile in [R, N] and what each layer gives there in float32, which it may write
            over; returns what is rounded.
        out: What the result is written to [R, N].
    """
    rows, (n_outputs, n_inputs) = inputs.reshape(-1, inputs.shape[-1]), layers[0][0].shape
    out = rows.new_empty(len(rows), n_outputs) if out is None else out
    most_outputs = max(1, _TILE_WEIGHTS // n_inputs)
    for outputs in _tiles(n_outputs, most_outputs):
        matrices = [_wide(f"weights {index}", weight[outputs]) for index, (weight, _bias) in enumerate(layers)]
        for own in _tiles(len(rows), _TILE_ROWS):
            wide, products = _wide("rows", rows[own]), []
            for index, (matrix, (_weight, bias)) in enumerate(zip(matrices, layers, strict=True)):
                product = torch.mm(wide, matrix.t(), out=_empty(f"products {index}", len(wide), len(matrix)))
                products.append(product if bias is None else product.add_(bias[outputs]))
            out[own, outputs] = finished((own, outputs), *products)
    return out.view(*inputs.shape[:-1], n_outputs)


def mm(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`rows @ weight.T`, [R, K] and [N, K] -> [R, N]; `out` is what it is written to."""
    if not widens(rows) or learns(rows, weight):
        return torch.mm(rows, weight.t(), out=out)
    return widened(rows, [(weight, None)], out=out)


def linears_widened(like: Any) -> contextlib.AbstractContextManager:
    """While the body runs, linear layers multiply so too, for upstream's functions; gradients go through to inputs.

    Args:
        like: Inputs, or a model; where products of such a type on such a device are quicker as they are, or inputs have
            few rows, nothing changes.
    """
    few = isinstance(like, torch.Tensor) and has_few_rows(like)
    return contextlib.nullcontext() if few or not widens(like) else _LinearsWidened()


class _LinearsWidened(TorchFunctionMode):
    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        call = _linear if function is functional.linear else function
        return call(*args, **(kwargs or {}))


def _linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if has_few_rows(inputs) or not widens(inputs) or learns(weight) or (bias is not None and learns(bias)):
        return functional.linear(inputs, weight, bias)
    return _Product.apply(inputs, weight, bias)


class _Product(torch.autograd.Function):
    """A product with a frozen matrix."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return widened(inputs, [(weight, bias)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        n_outputs, n_inputs = weight.shape
        rows = slopes.reshape(-1, n_outputs)
        found = rows.new_empty(len(rows), n_inputs)
        for own in _tiles(len(rows), _TILE_ROWS):
            sums = _empty("sums", len(rows[own]), n_inputs).zero_()
            for outputs in _tiles(n_outputs, max(1, _TILE_WEIGHTS // n_inputs)):
                sums.addmm_(_wide("rows", rows[own, outputs]), _wide("weights 0", weight[outputs]))
            found[own] = sums
        return found.view(*slopes.shape[:-1], n_inputs), None, None


def learns(*tensors: torch.Tensor) -> bool:
    """Whether gradients will be asked for, which `widened` doesn't have."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _tiles(size: int, most: int) -> Iterator[slice]:
    return (slice(first, min(first + most, size)) for first in range(0, size, most))


def _wide(purpose: str, matrix: torch.Tensor) -> torch.Tensor:
    """A matrix in float32, by rows or by columns as it lies."""
    if matrix.stride(0) < matrix.stride(1):
        return _wide(purpose, matrix.t()).t()
    return _empty(purpose, *matrix.shape).copy_(matrix)


def _empty(purpose: str, *shape: int) -> torch.Tensor:
    return buffer(purpose, shape, torch.float32, torch.device("cpu"))
