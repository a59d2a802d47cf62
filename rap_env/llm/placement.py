"""A model on several cards: its layers in equal runs, card after card, and all else on the first."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rap_env.errors import UnsupportedArchitecture

SPREAD = "spread"  # as a device: all cards that the process sees


def spread(model: nn.Module, decoder: nn.Module, devices: Sequence[torch.device | str]) -> nn.Module:
    """Moves a model onto devices, in place, without ever having all of it on one.

    Its sites run layer by layer (`SwitchableLLM.run`), which follows them; upstream's own forward, generation for one,
    does not.

    Args:
        model: The causal LM, on the CPU.
        decoder: The part of it that has the `layers`.
        devices: The first one gets embedding, final norm and head as well.

    Returns:
        The model.
    """
    layers, decoder.layers = decoder.layers, nn.ModuleList()
    model.to(devices[0])
    decoder.layers = layers
    for index, layer in enumerate(layers):
        layer.to(devices[index * len(devices) // len(layers)])
    return model


def refuse_spread(name: str, devices: Sequence[torch.device]) -> None:
    """Refuses a model whose layers are on several devices.

    Raises:
        UnsupportedArchitecture: They are.
    """
    if len(set(devices)) > 1:
        raise UnsupportedArchitecture(f"{name} is on several devices, where only windows of text can be read")


def moved(value: Any, device: torch.device) -> Any:
    """A tensor, or what holds tensors in dicts and tuples, on a device; what is there already is not copied."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(moved(item, device) for item in value)
    return value
