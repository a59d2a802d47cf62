"""What is checked about a model's files and the weights read from them: upstream would log it and go on."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from rap_env.errors import ModelUnavailable

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # as safetensors calls them


def weights_in(folder: Path) -> dict[str, str]:
    """The options with which transformers finds the weights of a local folder.

    Raises:
        ModelUnavailable: There are none in a safe format, some are missing, there are two sets, or an adapter.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if adapters := [name for name in names if name.startswith("adapter_")]:  # read only beside another library
        raise ModelUnavailable(
            f"{folder}: expected a whole model; found an adapter ({adapters[0]}): merge it into its base model"
        )
    if _WEIGHTS in names:
        if shards := [name for name in names if _SHARD.fullmatch(name)]:
            raise ModelUnavailable(f"{folder}: expected one set of weights; found {_WEIGHTS} and {shards[0]}: keep one")
        return {}
    if _INDEX in names:
        _check_shards(folder, names)
        return {}
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) != 1:
        raise ModelUnavailable(
            f"{folder}: expected {_WEIGHTS}, {_INDEX} with its shards, or exactly one *.gguf; found"
            f" {', '.join(names[:8]) or 'nothing'}."
            " Pickled weights (*.bin, *.pt) are not loaded: convert them to safetensors first"
        )
    return {"gguf_file": ggufs[0]}


def _weight_map(folder: Path) -> dict[str, str]:
    """Which shard holds which weight, by the index."""
    try:
        index = json.loads((folder / _INDEX).read_text())
        shards = dict(index["weight_map"].items())
        index["metadata"].items()  # transformers reads it too
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelUnavailable(f"{folder}: {_INDEX} does not say which shard holds which weight") from error
    if not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise ModelUnavailable(f"{folder}: {_INDEX} does not say which shard holds which weight")
    return shards


def _check_shards(folder: Path, names: Collection[str]) -> None:
    shards = sorted(set(_weight_map(folder).values()))
    if missing := [shard for shard in shards if shard not in names]:
        raise ModelUnavailable(
            f"{folder}: {len(missing)} of the {len(shards)} shards in {_INDEX} are missing, first {missing[0]!r}"
        )
    if more := [name for name in names if _SHARD.fullmatch(name) and name not in shards]:
        raise ModelUnavailable(f"{folder}: found {more[0]}, which {_INDEX} does not name: index it, or remove it")


def check_files(folder: Path, skeleton: nn.Module) -> None:
    """Refuses safetensors that disagree with their index or the config, by what they say in front of the weights.

    Args:
        folder: A folder that `weights_in` found safetensors in.
        skeleton: The model that its config describes, without weights.

    Raises:
        ModelUnavailable: A file is damaged, an index places a weight elsewhere, weights are whole numbers, or their
            sizes are not those of the config.
    """
    by_index = None if (folder / _WEIGHTS).is_file() else _weight_map(folder)
    by_config = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    sizes, unread = [], dict(by_index or {})
    for file in sorted(set(by_index.values()) if by_index else [_WEIGHTS]):
        for name, kind, shape in _weights_of(folder / file):
            if by_index and unread.pop(name, None) != file:
                problem = f"{file} holds {name!r}, which {_INDEX} places in {by_index.get(name, 'no shard')}"
                raise ModelUnavailable(f"{folder}: {problem}: write the index anew")
            if name in by_config and kind not in _FLOATS:
                problem = f"{name!r} in {file} is of type {kind}; quantised weights are not loaded: dequantise them"
                raise ModelUnavailable(f"{folder}: {problem}")
            if shape != by_config.get(name, shape):
                sizes.append((name, shape, by_config[name]))
    for name, file in sorted(unread.items()):
        raise ModelUnavailable(f"{folder}: {_INDEX} places {name!r} in {file}, which does not hold it")
    if sizes:
        raise ModelUnavailable(f"can't load {str(folder)!r}: {_about_sizes(sizes)}")


def _weights_of(path: Path) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names, types and sizes of a file's weights."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()]
    except SafetensorError as error:
        raise ModelUnavailable(
            f"can't load {str(path.parent)!r}: {path.name}: {error}: fetch the file again"
        ) from error


def _about_sizes(sizes: Iterable[tuple[str, Iterable[int], Iterable[int]]]) -> str:
    sizes = sorted(sizes)
    name, in_files, by_config = sizes[0]
    return (
        f"{len(sizes)} weights in its files have other sizes than by its config, first {name!r} with {list(in_files)}"
        f" for {list(by_config)}; all layers have to be alike"
    )


def check_weights(source: str, model: nn.Module, report: Mapping[str, Any]) -> None:
    """Refuses a model that is not exactly what its files hold, or holds what nothing can be computed with.

    Args:
        source: Where the model comes from.
        model: The model as it was loaded.
        report: The loading info of `from_pretrained`, with mismatched sizes ignored by it.

    Raises:
        ModelUnavailable: Files and config disagree on the weights, the family or the cache; or a weight is not finite.
    """
    named, family = model.config.architectures or [], type(model).__name__.removesuffix("ForCausalLM")
    cache = model.generation_config.cache_implementation
    if sizes := report["mismatched_keys"]:
        problem = _about_sizes(sizes)
    elif missing := sorted(report["missing_keys"]):
        problem = f"its files lack {len(missing)} weights, first {missing[0]!r}"
    elif more := sorted(report["unexpected_keys"]):
        problem = f"its files hold {len(more)} weights that its config has no place for, first {more[0]!r}"
    elif named and not any(name.lower().startswith(family.lower()) for name in named):
        problem = f"its config names the architecture {named[0]}, but the model_type of {family}"
    elif cache not in (None, "dynamic"):
        problem = f"its generation_config.json asks for a {cache} cache, which takes other bytes: remove the entry"
    elif odd := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        problem = (
            f"{len(odd)} weights are not finite in {model.dtype}, first {odd[0]!r}: choose a wider dtype, or mend them"
        )
    else:
        return
    raise ModelUnavailable(f"can't load {source!r}: {problem}")


def forget_quantisation(model: nn.Module) -> None:
    """Makes a model that was read from a GGUF the plain one that it is now: all its weights are dequantised."""
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
