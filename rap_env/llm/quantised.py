"""Weights as whole numbers with scales: what linear layers of INT8 and INT4 share, those of INT8, and an embedding.

A product with few rows, as in decoding, runs on torch's kernels over the whole numbers. For more rows they are slower
than an ordinary matrix product, so the matrix is dequantised, a tile at a time, into a buffer that each thread reuses.
Both ways sum in float32. The kernels also dequantise in float32 and round once, at the end; the other way rounds each
dequantised weight to the model's type, which moves the outputs about as far as that type's own rounding.

Shapes: R rows, N outputs, K inputs, V vocabulary.
"""

import torch
from torch import nn

from rap_env.llm.buffers import buffer
from rap_env.llm.widened import mm

ROWS = 64  # outputs that are dequantised together are a multiple of it
KERNEL_ROWS = 24  # most rows for the kernels; with 32, dequantising was as fast on AVX-512 for 576 x 576 to 1536 x 576
_TILE = 2**20  # weights that are dequantised at once; 2 MB in bfloat16, so that the product finds them in the cache
_INT8_INPUTS = 32  # of any other number torch 2.13's INT8 kernel reads past the end of a row in bfloat16

Kept = slice | torch.Tensor  # rows or columns: a run of them, or their indices


class Quantised(nn.Module):
    """A matrix of whole numbers with scales, in frozen parameters, so that all that counts or moves weights sees it."""

    def _keep(self, **tensors: torch.Tensor | None) -> None:
        for name, tensor in tensors.items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))


class QuantisedLinear(Quantised):
    """What the two linear layers share: the choice of the way, tiles and biases, [..., K] -> [..., N]."""

    in_features: int
    out_features: int
    bias: torch.Tensor | None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        few = len(rows) <= KERNEL_ROWS and rows.device.type == "cpu"
        outputs = self._by_kernel(rows.contiguous()) if few and self._has_kernel() else self._by_tiles(rows)
        if self.bias is not None:
            outputs += self.bias
        return outputs.view(*inputs.shape[:-1], -1)

    def matrix(self, outputs: slice) -> torch.Tensor:
        """The dequantised weights of some outputs [K, outputs], in a buffer: valid until the thread's next call."""
        raise NotImplementedError

    def requantised(self, weight: torch.Tensor, bias: torch.Tensor | None) -> "QuantisedLinear":
        """A layer of the same format with other weights [N, K], given in full precision."""
        raise NotImplementedError

    def cut(self, dim: int, kept: Kept) -> dict[str, torch.Tensor]:
        """The tensors that belong to some outputs (dimension 0) or inputs (1); views where `kept` is a slice.

        What belongs to an output as a whole, such as its bias, does not belong to its inputs.
        """
        raise NotImplementedError

    def _by_kernel(self, rows: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _has_kernel(self) -> bool:
        raise NotImplementedError

    def _by_tiles(self, rows: torch.Tensor) -> torch.Tensor:
        n_outputs, size = self.out_features, max(ROWS, _TILE // self.in_features // ROWS * ROWS)
        tiles = [slice(first, min(first + size, n_outputs)) for first in range(0, n_outputs, size)]
        products = [mm(rows, self.matrix(tile).t()) for tile in tiles]
        return products[0] if len(products) == 1 else torch.cat(products, 1)


class Int8Linear(QuantisedLinear):
    """A linear layer with INT8 weights [N, K] and a symmetric scale for each output [N].

    Args:
        weight: The weights [N, K] to quantise, or INT8 ones that another module holds too.
        bias: Biases [N], which stay as they are; None for none.
        scales: Those of INT8 weights.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, scales: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        if scales is None:
            weight, scales = int8_rows(weight)
        self._keep(weight=weight, scales=scales, bias=bias)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def matrix(self, outputs: slice) -> torch.Tensor:
        weight, scales = self.weight[outputs], self.scales[outputs, None]
        return torch.mul(weight, scales, out=dequantised_into(weight.shape, scales)).t()

    def requantised(self, weight: torch.Tensor, bias: torch.Tensor | None) -> "Int8Linear":
        return Int8Linear(weight, bias)

    def cut(self, dim: int, kept: Kept) -> dict[str, torch.Tensor]:
        if dim == 1:
            return {"weight": self.weight[:, kept]}
        bias = {} if self.bias is None else {"bias": self.bias[kept]}
        return {"weight": self.weight[kept], "scales": self.scales[kept]} | bias

    def _has_kernel(self) -> bool:
        return self.in_features % _INT8_INPUTS == 0

    def _by_kernel(self, rows: torch.Tensor) -> torch.Tensor:
        side_by_side(self, "weight")
        return torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scales)


class Int8Embedding(Quantised):
    """An embedding with INT8 rows and a scale for each, [...] -> [..., K].

    Args:
        weight: The rows [V, K] to quantise.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        weight, scales = int8_rows(weight)
        self._keep(weight=weight, scales=scales)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.weight[input_ids] * self.scales[input_ids, None]


def int8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 numbers of the same shape and a symmetric scale for each row, in the weights' type."""
    exact = weight.detach().float().contiguous()  # kernels want rows that lie side by side
    scales = at_least_tiny(exact.abs().amax(-1) / 127, weight.dtype)
    return (exact / scales[..., None].float()).round().clamp(-127, 127).to(torch.int8), scales


def at_least_tiny(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return scales.clamp(min=torch.finfo(dtype).tiny).to(dtype)  # of zeros: nothing may be divided by zero


def side_by_side(module: nn.Module, *names: str) -> None:
    """Copies what is a view with gaps, once: kernels want rows that lie side by side; only a cut layer has others."""
    for name in names:
        if not (tensor := module._parameters[name]).is_contiguous():
            module._parameters[name] = nn.Parameter(tensor.contiguous(), requires_grad=False)


def dequantised_into(shape: tuple[int, ...], scales: torch.Tensor) -> torch.Tensor:
    """The buffer for a dequantised matrix, of the type and device of its scales."""
    return buffer("dequantised", shape, scales.dtype, scales.device)
