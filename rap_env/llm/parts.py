"""Parts of a site: a KV head with its query heads, a group of MLP channels; and a layer that runs with some of them."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn

GROUP_CHANNELS = 64  # MLP channels of a part
_QUERIES = "self_attn.q_proj"

# Of a site's parts, which rows (dimension 0) or columns (1) of which matrices are theirs, by path in the layer.
Cut = dict[str, tuple[int, slice]]


def cut_mlp(layer: nn.Module, inner: Sequence[str], output: str) -> dict[str, Cut]:
    """The parts of an MLP by name: as many channels each, the first one what is left; `128:192` are 128 to 191.

    So where parts go from the last to the first, all that goes before the first weighs the same.

    Args:
        layer: A decoder layer.
        inner: Paths of the matrices into the MLP's channels.
        output: Path of the one back to the residual stream.
    """
    n_channels, cuts = layer.get_submodule(output).in_features, {}
    for first, end in pairwise([0, *reversed(range(n_channels, 0, -GROUP_CHANNELS))]):
        channels = slice(first, end)
        cuts[f"{channels.start}:{channels.stop}"] = dict.fromkeys(inner, (0, channels)) | {output: (1, channels)}
    return cuts


def cut_attention(layer: nn.Module, output: str) -> dict[str, Cut]:
    """The parts of an attention by the number of their KV head: that head and the query heads that read it.

    Args:
        layer: A decoder layer.
        output: Path of the matrix back to the residual stream.
    """
    attention, cuts = layer.self_attn, {}
    head = attention.head_dim
    n_kv_heads = attention.k_proj.out_features // head
    width = attention.q_proj.out_features // n_kv_heads
    for index in range(n_kv_heads):
        own, queries = slice(index * head, (index + 1) * head), slice(index * width, (index + 1) * width)
        inner = {_QUERIES: (0, queries), "self_attn.k_proj": (0, own), "self_attn.v_proj": (0, own)}
        cuts[str(index)] = inner | {output: (1, queries)}
    return cuts


def weight_bytes(layer: nn.Module, cut: Cut) -> int:
    """Bytes of a part's weights; a bias of rows is the part's, one of the residual stream's channels is nobody's."""
    tensors = (cut_tensors(layer, path, dim, own).values() for path, (dim, own) in cut.items())
    return sum(tensor.nbytes for of_matrix in tensors for tensor in of_matrix)


def add_bias(linear: nn.Linear) -> None:
    """Gives an output matrix a bias of zeros, unless it has one."""
    if linear.bias is None:
        linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), requires_grad=False)


def narrowed(layer: nn.Module, cuts: Sequence[Cut]) -> nn.Module:
    """A copy of a layer that has only some parts of one site.

    Where the parts lie side by side its weights are views of the layer's own; otherwise they are copied.

    Args:
        layer: A decoder layer; stays as it is.
        cuts: At least one part of one site.
    """
    tensors = {}
    for path, (dim, _) in cuts[0].items():
        kept = _joined([cut[path][1] for cut in cuts])
        tensors |= {(path, name): tensor for name, tensor in cut_tensors(layer, path, dim, kept).items()}
    module = with_tensors(layer, tensors)
    if _QUERIES in cuts[0] and hasattr(module.self_attn, "num_heads"):  # OPT's says it; the others read their matrices
        widths = (cut[_QUERIES][1].stop - cut[_QUERIES][1].start for cut in cuts)
        module.self_attn.num_heads = sum(widths) // module.self_attn.head_dim
    return module


def with_tensors(layer: nn.Module, tensors: Mapping[tuple[str, str], torch.Tensor]) -> nn.Module:
    """A copy of a layer that has other tensors in some places.

    Args:
        layer: A decoder layer; stays as it is.
        tensors: By path of the module that has them, and name in it.
    """
    copies = _copy(layer)
    for (path, name), tensor in tensors.items():
        _copied_on_the_way(copies, path)._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return copies[""]


def with_modules(layer: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of a layer that has other modules at some paths.

    Args:
        layer: A decoder layer; stays as it is.
        modules: By path.
    """
    copies = _copy(layer)
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        _copied_on_the_way(copies, parent)._modules[name] = module
    return copies[""]


def _copy(layer: nn.Module) -> dict[str, nn.Module]:
    """A copy of a layer, under the empty path."""
    copied = _shallow(layer)
    copied.__dict__.pop("forward", None)  # what a model runs instead holds the layers of the mask before
    return {"": copied}


def _copied_on_the_way(copies: dict[str, nn.Module], path: str) -> nn.Module:
    """The copy of a module, made with those of the modules that hold it; no closure: it would keep all from going."""
    if path not in copies:
        parent, _, name = path.rpartition(".")
        holder = _copied_on_the_way(copies, parent)
        copies[path] = holder._modules[name] = _shallow(holder.get_submodule(name))
    return copies[path]


def twin(module: nn.Module) -> nn.Module:
    """Another object with everything that a module has: what `copy.copy` makes, but quicker.

    A switch of masks makes hundreds.
    """
    made = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    return made


def replace_linear(layer: nn.Module, path: str, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Gives a layer that `narrowed` returned another matrix in the number format of the one that it has.

    Args:
        layer: Changed in place; the layer that it was narrowed from is not.
        path: Of the matrix.
        weight: As it would be in full precision [N, K], on any device.
        bias: Its bias [N]; None leaves the one that is there.
    """
    parent, _, name = path.rpartition(".")
    linear = layer.get_submodule(path)
    device = linear.weight.device
    weight, bias = weight.to(device), linear.bias if bias is None else bias.to(device)
    if hasattr(linear, "requantised"):
        layer.get_submodule(parent)._modules[name] = linear.requantised(weight, bias)
    else:
        own = {"weight": weight, "bias": bias}
        linear._parameters |= {key: t if t is None else nn.Parameter(t, requires_grad=False) for key, t in own.items()}


def cut_tensors(layer: nn.Module, path: str, dim: int, kept: slice | torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of rows or columns of a matrix; one that is no plain `nn.Linear` has a method `cut` for it."""
    linear = layer.get_submodule(path)
    if hasattr(linear, "cut"):
        return linear.cut(dim, kept)
    if dim == 1:
        return {"weight": linear.weight[:, kept]}
    bias = {} if linear.bias is None else {"bias": linear.bias[kept]}
    return {"weight": linear.weight[kept]} | bias


def _joined(slices: Sequence[slice]) -> slice | torch.Tensor:
    if all(one.stop == following.start for one, following in pairwise(slices)):
        return slice(slices[0].start, slices[-1].stop)
    return torch.cat([torch.arange(part.start, part.stop) for part in slices])


def _shallow(module: nn.Module) -> nn.Module:
    copied = twin(module)
    copied.__dict__.update(_parameters=dict(module._parameters), _modules=dict(module._modules))
    return copied
