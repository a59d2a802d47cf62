"""Linear layers with INT4 weights, in the layout of torch's kernel for this CPU.

Shapes: R rows, N outputs, K inputs, G inputs of a group, B outputs of a block.
"""

import functools
from collections.abc import Callable

import torch

from rap_env.errors import UnsupportedArchitecture
from rap_env.llm.quantised import ROWS, Kept, QuantisedLinear, at_least_tiny, dequantised_into, side_by_side

_BLOCKS = (64, 32)  # outputs that lie together in the kernel's layout, for AVX-512 and AVX2
_FITS = 4  # of a grid to its numbers; 8 more take another 1.4% off the squared error of normal weights


class Int4Linear(QuantisedLinear):
    """A linear layer with INT4 weights, and a scale and zero point for each output and group of inputs.

    Weights lie as torch's kernel for this CPU wants them, so that nothing is kept twice: uint8 [N / B, K, B / 2] in
    blocks of B outputs, 64 with AVX-512 and 32 with AVX2; a byte holds output b of a block in its low and b + B / 2 in
    its high half. `scales` [K / G, N, 2] hold each group's scale and zero point: weight = (number - 8) * scale + zero.

    Args:
        weight: The weights [N, K] to quantise; `check_int4` says which sizes can be.
        bias: Biases [N], which stay as they are; None for none.
        group: Inputs that share a scale and zero point.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, group: int = 64) -> None:
        super().__init__()
        numbers, scales = _in_groups(weight, group)
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

    @property
    def group(self) -> int:
        return self.in_features // len(self.scales)

    def matrix(self, outputs: slice) -> torch.Tensor:
        packed = self.weight[outputs.start // self._block : outputs.stop // self._block]
        scales, zeros = self.scales[:, None, outputs].unbind(-1)
        matrix = dequantised_into((self.in_features, scales.shape[2]), scales)
        halves = matrix.view(self.in_features, len(packed), 2, -1).permute(2, 1, 0, 3)  # [2, blocks, K, B / 2]
        halves[0].copy_((packed & 15).view(torch.int8).sub_(8))
        halves[1].copy_((packed >> 4).view(torch.int8).sub_(8))
        groups = matrix.view(len(scales), self.group, -1)
        # Contiguous scales: with every second number of the kernel's table this would take four times as long.
        torch.addcmul(zeros.contiguous(), groups, scales.contiguous(), out=groups)
        return matrix

    def requantised(self, weight: torch.Tensor, bias: torch.Tensor | None) -> "Int4Linear":
        return Int4Linear(weight, bias, self.group)

    def cut(self, dim: int, kept: Kept) -> dict[str, torch.Tensor]:
        if dim == 1:
            return {"weight": self.weight[:, kept], "scales": self.scales[_every(self.group, kept, self.group)]}
        bias = {} if self.bias is None else {"bias": self.bias[kept]}
        return {"weight": self.weight[_every(self._block, kept, ROWS)], "scales": self.scales[:, kept]} | bias

    def _has_kernel(self) -> bool:
        return int4_layout() == (self._block, True)

    def _by_kernel(self, rows: torch.Tensor) -> torch.Tensor:
        side_by_side(self, "weight", "scales")
        packed = self.weight.view(self.out_features, -1)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, self.group, self.scales)


def _in_groups(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers 0 to 15 [N, K], and scales with zero points [K / G, N, 2] in the weights' type.

    A group's first grid reaches from its least to its largest weight. Then numbers are rounded to nearest, and the grid
    is fitted to them by least squares, in turn: neither step can raise the squared error.
    """
    groups = weight.detach().float().contiguous().unflatten(1, (-1, group))  # [N, K / G, G]
    least, most = groups.aminmax(dim=-1, keepdim=True)
    scales, zeros = (most - least) / 15, least + (most - least) * 8 / 15

    def round_all() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rounded = at_least_tiny(scales, weight.dtype).float(), zeros.to(weight.dtype).float()
        return *rounded, ((groups - rounded[1]) / rounded[0]).round().clamp(-8, 7)

    for _ in range(_FITS):
        steps = round_all()[2]
        mean = steps.mean(-1, keepdim=True)
        apart = steps - mean
        scales = (apart * groups).sum(-1, keepdim=True) / apart.square().sum(-1, keepdim=True).clamp(min=0.5)
        zeros = groups.mean(-1, keepdim=True) - scales * mean
    scales, zeros, steps = round_all()
    table = torch.cat([scales, zeros], -1).to(weight.dtype).transpose(0, 1).contiguous()
    return (steps + 8).to(torch.uint8).flatten(1), table


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


def check_int4(name: str, weight: torch.Tensor, group: int) -> None:
    """Refuses a matrix that groups of inputs and the kernel's blocks of outputs don't divide.

    Args:
        name: What the error calls it.
        weight: The weights [N, K].
        group: Inputs that share a scale and zero point.

    Raises:
        UnsupportedArchitecture: Inputs are no multiple of the group, or outputs none of 64.
    """
    n_outputs, n_inputs = weight.shape
    if n_outputs % ROWS or n_inputs % group:
        raise UnsupportedArchitecture(
            f"expected inputs in multiples of {group} and outputs in multiples of {ROWS} for int4 weights; {name} has"
            f" {n_inputs} inputs and {n_outputs} outputs: choose weights int8"
        )


def _every(size: int, kept: Kept, multiple: int) -> Kept:
    """Which groups of so many rows or columns are kept; parts begin and end at multiples."""
    if isinstance(kept, torch.Tensor):
        return kept[::size] // size
    if kept.start % multiple or kept.stop % multiple:
        raise UnsupportedArchitecture(
            f"expected parts in multiples of {multiple} channels for int4 weights; got channels {kept.start} to"
            f" {kept.stop}: choose weights int8, or granularity block"
        )
    return slice(kept.start // size, kept.stop // size)
