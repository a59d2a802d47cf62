"""A layer's arithmetic in few passes over memory.

On a CPU with instructions for bfloat16 the matrix products of a layer are so fast that what lies between them takes as
long. Norms and rotary positions here give the same bits as upstream's modules. In bfloat16 on a CPU, oneDNN adds the
residual stream, applies SiLU and multiplies by the gate in the matrix product itself, before it rounds, by the
operation that `torch.compile` makes of a linear layer and what follows it: results differ from upstream's in the last
bit and lie nearer to those in float32. All other types, devices and modules (quantised ones, such with hooks) run as
upstream's do, bit by bit.
"""

import torch
from torch import nn
from transformers.activations import SiLUActivation

from rap_env.llm import few_rows
from rap_env.llm.widened import has_few_rows, learns, linears_widened, widened, widens

_TILE_ELEMENTS = 2**17  # of float32: what a tile needs stays in a core's cache


def rms_norm(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """An RMS norm [..., H] -> [..., H], tile by tile of the rows; with upstream's bits.

    Args:
        norm: Upstream's module, or one for few rows, which computes by itself.
        hidden: States of the model's type.
    """
    own = isinstance(norm, few_rows.FewRowsNorm) or hooked(norm)
    if own or hidden.device.type != "cpu" or learns(hidden, norm.weight):
        return norm(hidden)
    if has_few_rows(hidden):
        return norm(hidden)
    rows = hidden.reshape(-1, hidden.shape[-1])
    normed = torch.empty_like(rows)
    tile_rows = -(-_TILE_ELEMENTS // rows.shape[1])
    for tile, out in zip(rows.split(tile_rows), normed.split(tile_rows), strict=True):
        exact = tile.float()
        scales = torch.rsqrt(exact.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        out.copy_(exact * scales).mul_(norm.weight)
    return normed.view(hidden.shape)


def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions of queries or keys; with upstream's bits.

    Args:
        states: [B, T, h, D].
        cos: [B or 1, T, 1, D], its halves alike.
        sin: As `cos`.
    """
    if few_rows.rotates(states, cos) and not learns(states):
        return few_rows.rotated(states, cos, sin)
    half = states.shape[-1] // 2
    turned = states * cos
    turned[..., :half] -= states[..., half:] * sin[..., :half]
    turned[..., half:] += states[..., :half] * sin[..., half:]
    return turned


def product(linear: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """`linear(inputs)`, [..., C] -> [..., H]."""
    if type(linear) is not nn.Linear:  # those for few rows and quantised ones have their own ways
        return linear(inputs)
    with linears_widened(inputs):
        return linear(inputs)


def added(linear: nn.Module, inputs: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """`residual + linear(inputs)`, [..., C] -> [..., H]."""
    if not _fuses(linear, inputs):
        return residual + product(linear, inputs)
    if widens(inputs):
        rows = residual.reshape(-1, residual.shape[-1])
        return widened(inputs, [_layer(linear)], lambda place, summed: summed.add_(rows[place]))
    return torch.ops.mkldnn._linear_pointwise.binary(inputs, residual, _dense(linear.weight), linear.bias, "add")


def gated(gate: nn.Module, up: nn.Module, activation: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """`activation(gate(inputs)) * up(inputs)`, [..., H] -> [..., C]."""
    if not (_fuses(gate, inputs) and _fuses(up, inputs) and isinstance(activation, nn.SiLU | SiLUActivation)):
        return activation(product(gate, inputs)) * product(up, inputs)
    if widens(inputs):
        return widened(inputs, [_layer(gate), _layer(up)], _opened)
    opened = torch.ops.mkldnn._linear_pointwise(inputs, _dense(gate.weight), gate.bias, "swish", [1.0], "")
    return torch.ops.mkldnn._linear_pointwise.binary(inputs, opened, _dense(up.weight), up.bias, "mul")


def _opened(_place: tuple[slice, slice], gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return nn.functional.silu(gate, inplace=True).mul_(up)


def _layer(linear: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    return linear.weight, linear.bias


def read_heads_in_place(model: nn.Module) -> nn.Module:
    """Makes a causal LM's head read states that are a slice of others, and returns the model.

    Torch copies a frozen matrix once for each sequence where its input is such a slice, as upstream's last position is:
    for the embedded model 0.3 s for each prompt of a prefill, in place of 0.02 s for all.
    """
    model.get_output_embeddings().register_forward_pre_hook(_with_plain_strides)
    return model


def _with_plain_strides(_head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    hidden, *others = inputs
    if hidden.stride() == torch.empty(hidden.shape, device="meta").stride():
        return inputs
    return hidden.clone(memory_format=torch.contiguous_format), *others


def hooked(module: nn.Module) -> bool:
    """Whether somebody wants to see a module's calls, so that it has to be called."""
    seen_before = any(hook is not _with_plain_strides for hook in module._forward_pre_hooks.values())
    return seen_before or bool(module._forward_hooks)


def _dense(weight: torch.Tensor) -> torch.Tensor:
    """Without gaps between its rows or columns [N, K]: oneDNN takes others by a loop, a thousand times slower."""
    return weight if weight.is_contiguous() or weight.T.is_contiguous() else weight.contiguous()


def _fuses(linear: nn.Module, inputs: torch.Tensor) -> bool:
    return (
        inputs.dtype == torch.bfloat16
        and not has_few_rows(inputs)
        and inputs.device.type == "cpu"
        and type(linear) is nn.Linear
        and not hooked(linear)
        and not learns(inputs, linear.weight)
        and (widens(inputs) or _has_fused_products())
    )


def _has_fused_products() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
