"""Policies: (workload, budget) -> pruning mask; how they are saved, and read again without running anything."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rap_env.errors import PolicyUnreadable, UnknownName
from rap_env.llm.architecture import ModelShape
from rap_env.mask import PruningMask
from rap_env.memory.workload import Workload

_DESCRIPTION, _TENSORS, _FORMAT = "policy.json", "policy.safetensors", 1
_KINDS: dict[str, type["Policy"]] = {}


class Policy(Protocol):
    """Everything that an agent ends as.

    Attributes:
        kind: Name of the policy's class in saved files.
        shape: The model that it was made for.
    """

    kind: ClassVar[str]
    shape: ModelShape

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        """Chooses a mask.

        Raises:
            InfeasibleBudget: No mask of this policy can meet the budget.
        """

    def parameters(self) -> dict[str, Any]:
        """What JSON can hold of the policy: the arguments of its constructor besides shape and tensors."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its weights by name; empty for policies that learn none."""

    @classmethod
    def restore(cls, shape: ModelShape, parameters: Mapping, tensors: Mapping[str, torch.Tensor]) -> "Policy":
        """Builds the policy again from what was saved."""


def policy_kind(cls: type) -> type:
    """Class decorator: makes a policy readable by `load_policy`."""
    _KINDS[cls.kind] = cls
    return cls


def save_policy(policy: Policy, folder: str | Path) -> Path:
    """Writes a policy as JSON and safetensors, the description last, so that a folder with one is complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tensors := {name: tensor.detach().cpu().contiguous() for name, tensor in policy.tensors().items()}:
        save_file(tensors, folder / _TENSORS)
    description = {
        "format": _FORMAT,
        "kind": policy.kind,
        "shape": asdict(policy.shape),
        "parameters": policy.parameters(),
    }
    draft = folder / f".{_DESCRIPTION}"
    draft.write_text(json.dumps(description, indent=2) + "\n")
    draft.replace(folder / _DESCRIPTION)
    return folder


def load_policy(folder: str | Path) -> Policy:
    """Reads a saved policy; only JSON and safetensors are opened, so nothing in the folder is executed.

    Raises:
        PolicyUnreadable: The folder holds no policy, or one that is damaged or of another format.
        UnknownName: The policy is of a kind that this version does not know.
    """
    folder = Path(folder)
    path = folder / _DESCRIPTION
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise PolicyUnreadable(f"{folder}: expected {_DESCRIPTION} (and {_TENSORS}); found: {found or 'nothing'}")
    try:
        description = json.loads(path.read_text())
        if description["format"] != _FORMAT:
            raise PolicyUnreadable(f"{path}: expected format {_FORMAT}; got {description['format']!r}")
        kind, shape = description["kind"], ModelShape(**description["shape"])
        tensors = load_file(folder / _TENSORS) if (folder / _TENSORS).is_file() else {}
        if kind in _KINDS:
            return _KINDS[kind].restore(shape, description["parameters"], tensors)
    except PolicyUnreadable:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise PolicyUnreadable(f"{folder}: not a policy of this version: {error}") from error
    raise UnknownName("policy kind", kind, _KINDS)
