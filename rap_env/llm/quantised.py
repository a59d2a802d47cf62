"""Weights in INT8 or INT4: linear layers and an embedding that keep whole numbers and scales, and hold no others.

A product with few rows, as in decoding, runs on torch's kernels over the whole numbers. For more rows they are slower
than an ordinary matrix product, so the matrix is dequantised, a tile at a time, into a buffer that each thread reuses.
Both ways sum in float32. The kernels also dequantise in float32 and round once, at the end; the other way rounds each
dequantised weight to the model's type, which moves the outputs about as far as that type's own rounding.

Shapes: R rows, N outputs, K inputs, V vocabulary.
"""

import functools
import threading
from collections.abc import Callable

import torch
from torch import nn

from rap_env.errors import UnsupportedArchitecture

GROUP = 64  # inputs that share an INT4 scale and zero point; 576, SmolLM2's width, is no multiple of 128
KERNEL_ROWS = 24  # most rows for the kernels; with 32, dequantising was as fast on AVX-512 for 576 x 576 to 1536 x 576
_TILE = 2**20  # weights that are dequantised at once; 2 MB in bfloat16, so that the product finds them in the cache
_INT8_INPUTS = 32  # of any other number torch 2.13's INT8 kernel reads past the end of a row in bfloat16
_BLOCKS = (64, 32)  # rows that lie together in the INT4 kernels' layouts, for AVX-512 and AVX2
_HERE = threading.local()  # `buffers` by type and device

Kept = slice | torch.Tensor  # rows or columns: a run of them, or their indices


class _Quantised(nn.Module):
    """A matrix of whole numbers with scales, in frozen parameters, so that all that counts or moves weights sees it."""

    def _keep(self, **tensors: torch.Tensor | None) -> None:
        for name, tensor in tensors.items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))


class _QuantisedLinear(_Quantised):
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
        n_outputs, size = self.out_features, max(GROUP, _TILE // self.in_features // GROUP * GROUP)
        tiles = [slice(first, min(first + size, n_outputs)) for first in range(0, n_outputs, size)]
        products = [torch.mm(rows, self.matrix(tile)) for tile in tiles]
        return products[0] if len(products) == 1 else torch.cat(products, 1)


class Int8Linear(_QuantisedLinear):
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
        return torch.mul(weight, scales, out=_buffer(weight.shape, scales)).t()

    def cut(self, dim: int, kept: Kept) -> dict[str, torch.Tensor]:
        if dim == 1:
            return {"weight": self.weight[:, kept]}
        bias = {} if self.bias is None else {"bias": self.bias[kept]}
        return {"weight": self.weight[kept], "scales": self.scales[kept]} | bias

    def _has_kernel(self) -> bool:
        return self.in_features % _INT8_INPUTS == 0

    def _by_kernel(self, rows: torch.Tensor) -> torch.Tensor:
        _side_by_side(self, "weight")
        return torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scales)


class Int4Linear(_QuantisedLinear):
    """A linear layer with INT4 weights, and a scale and zero point for each output and `GROUP` inputs.

    Weights lie as torch's kernel for this CPU wants them, so that nothing is kept twice: uint8 [N / B, K, B / 2] in
    blocks of B outputs, 64 with AVX-512 and 32 with AVX2; a byte holds output b of a block in its low and b + B / 2 in
    its high half. `scales` [K / 64, N, 2] hold scale and zero point: weight = (number - 8) * scale + zero point.

    Args:
        weight: The weights [N, K] to quantise; `check_int4` says which sizes can be.
        bias: Biases [N], which stay as they are; None for none.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        numbers, scales = _int4_groups(weight)
        self._keep(weight=_packed(numbers, int4_layout()[0]), scales=scales, bias=bias)

    @property
    def out_features(self) -> int:
        return self.scales.shape[1]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def _block(self) -> int:
        return 2 * self.weight.shape[2]

    def matrix(self, outputs: slice) -> torch.Tensor:
        packed = self.weight[outputs.start // self._block : outputs.stop // self._block]
        scales, zeros = self.scales[:, None, outputs].unbind(-1)
        matrix = _buffer((self.in_features, scales.shape[2]), scales)
        halves = matrix.view(self.in_features, len(packed), 2, -1).permute(2, 1, 0, 3)  # [2, blocks, K, B / 2]
        halves[0].copy_((packed & 15).view(torch.int8).sub_(8))
        halves[1].copy_((packed >> 4).view(torch.int8).sub_(8))
        groups = matrix.view(len(scales), GROUP, -1)
        # Contiguous scales: with every second number of the kernel's table this would take four times as long.
        torch.addcmul(zeros.contiguous(), groups, scales.contiguous(), out=groups)
        return matrix

    def cut(self, dim: int, kept: Kept) -> dict[str, torch.Tensor]:
        if dim == 1:
            return {"weight": self.weight[:, kept], "scales": self.scales[_every(GROUP, kept)]}
        bias = {} if self.bias is None else {"bias": self.bias[kept]}
        _every(GROUP, kept)
        return {"weight": self.weight[_every(self._block, kept)], "scales": self.scales[:, kept]} | bias

    def _has_kernel(self) -> bool:
        return int4_layout() == (self._block, True)

    def _by_kernel(self, rows: torch.Tensor) -> torch.Tensor:
        _side_by_side(self, "weight", "scales")
        packed = self.weight.view(self.out_features, -1)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, GROUP, self.scales)


class Int8Embedding(_Quantised):
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
    exact = weight.detach().float()
    scales = _at_least_tiny(exact.abs().amax(-1) / 127, weight.dtype)
    return (exact / scales[..., None].float()).round().clamp(-127, 127).to(torch.int8), scales


def _int4_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers 0 to 15 [N, K], and scales with zero points [K / 64, N, 2] in the weights' type; rounded to nearest."""
    groups = weight.detach().float().unflatten(1, (-1, GROUP))  # [N, K / 64, 64]
    least, most = groups.aminmax(dim=-1)
    scales = _at_least_tiny((most - least) / 15, weight.dtype)
    zeros = (least + 8 * scales.float()).to(weight.dtype)
    numbers = ((groups - zeros[..., None].float()) / scales[..., None].float()).round() + 8
    return numbers.clamp(0, 15).to(torch.uint8).flatten(1), torch.stack([scales, zeros], -1).transpose(
        0, 1
    ).contiguous()


def _at_least_tiny(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return scales.clamp(min=torch.finfo(dtype).tiny).to(dtype)  # of zeros: nothing may be divided by zero


def _packed(numbers: torch.Tensor, block: int) -> torch.Tensor:
    """[N, K] -> [N / block, K, block / 2]: two numbers to a byte."""
    low, high = numbers.view(len(numbers) // block, 2, block // 2, -1).unbind(1)
    return (low | (high << 4)).transpose(1, 2).contiguous()


@functools.cache
def int4_layout() -> tuple[int, bool]:
    """Rows of a block, and whether the kernel of this CPU reads such blocks; without it products are dequantised."""
    numbers = torch.arange(64 * 64, dtype=torch.int32, device="cpu").view(64, 64) % 61 % 16
    convert: Callable = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    try:
        by_kernel = convert(numbers, 1)
    except (NotImplementedError, RuntimeError):
        return _BLOCKS[0], False
    for block in _BLOCKS:
        if torch.equal(by_kernel.flatten(), _packed(numbers.to(torch.uint8), block).flatten()):
            return block, True
    return _BLOCKS[0], False


def check_int4(name: str, weight: torch.Tensor) -> None:
    """Refuses a matrix that INT4 groups and the kernel's blocks don't divide.

    Raises:
        UnsupportedArchitecture: Inputs or outputs are not multiples of 64.
    """
    n_outputs, n_inputs = weight.shape
    if n_outputs % GROUP or n_inputs % GROUP:
        raise UnsupportedArchitecture(
            f"expected inputs and outputs in multiples of {GROUP} for int4 weights; {name} has {n_inputs} inputs and"
            f" {n_outputs} outputs: choose weights int8"
        )


def _every(size: int, kept: Kept) -> Kept:
    """Which groups of so many rows or columns are kept."""
    if isinstance(kept, torch.Tensor):
        return kept[::size] // size
    if kept.start % GROUP or kept.stop % GROUP:
        raise UnsupportedArchitecture(
            f"expected parts in multiples of {GROUP} channels for int4 weights; got channels {kept.start} to"
            f" {kept.stop}: choose weights int8, or granularity block"
        )
    return slice(kept.start // size, kept.stop // size)


def _side_by_side(module: nn.Module, *names: str) -> None:
    """Copies what is a view with gaps, once: kernels want rows that lie side by side; only a cut layer has others."""
    for name in names:
        if not (tensor := module._parameters[name]).is_contiguous():
            module._parameters[name] = nn.Parameter(tensor.contiguous(), requires_grad=False)


def _buffer(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """A tensor of the thread's own, used again by every call for the same type and device."""
    buffers = _HERE.__dict__.setdefault("buffers", {})
    size, key = shape[0] * shape[1], (like.dtype, like.device)
    if key not in buffers or len(buffers[key]) < size:
        with torch.inference_mode(False):  # so that it can be written to in any mode
            buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
    return buffers[key][:size].view(shape)
