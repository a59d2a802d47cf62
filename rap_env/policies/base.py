"""Policies: (workload, budget) -> pruning mask; how they are saved, and read again without running anything."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save

from rap_env.errors import PolicyUnreadable, UnknownName, check_known
from rap_env.files import write_over
from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask
from rap_env.memory.workload import Workload
from rap_env.reading import reading

_DESCRIPTION, _FORMAT = "policy.json", 2
_KINDS: dict[str, type["Policy"]] = {}


class Policy:
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
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """What JSON can hold of the policy: the arguments of its constructor besides shape and tensors."""
        raise NotImplementedError

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its weights by name; empty for policies that learn none."""
        return {}

    @classmethod
    def restore(cls, shape: ModelShape, parameters: Mapping, tensors: Mapping[str, torch.Tensor]) -> "Policy":
        """Builds the policy again from what was saved."""
        return cls(shape, **parameters)


def policy_kind(cls: type) -> type:
    """Class decorator: makes a policy readable by `load_policy`."""
    _KINDS[cls.kind] = cls
    return cls


def save_policy(policy: Policy, folder: str | Path) -> Path:
    """Writes a policy as JSON and safetensors, in place of an older one or not at all.

    The tensors' file is named by its content and the description, which names it, is written last and in one piece: who
    reads meanwhile sees the old policy or the new one.
    """
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in policy.tensors().items()}
    name = None
    if tensors:
        content = save(tensors)
        name = f"policy-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
        write_over(folder / name, content)
    description = {
        "format": _FORMAT,
        "kind": policy.kind,
        "shape": policy.shape.to_dict(),
        "parameters": policy.parameters(),
        "tensors": name,
    }
    write_over(folder / _DESCRIPTION, json.dumps(description, indent=2) + "\n")
    for older in folder.glob("policy-*.safetensors"):
        if older.name != name:
            older.unlink(missing_ok=True)
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
        raise PolicyUnreadable(f"{folder}: expected {_DESCRIPTION}; found: {found or 'nothing'}")
    with reading(folder, "a policy of this version", PolicyUnreadable):
        description = json.loads(path.read_text(encoding="utf-8"))
        if description["format"] != _FORMAT:
            raise PolicyUnreadable(f"{path}: expected format {_FORMAT}; got {description['format']!r}")
        kind, shape = description["kind"], ModelShape.from_dict(description["shape"])
        tensors = load_file(folder / Path(description["tensors"]).name) if description["tensors"] else {}
        if odd := sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()):
            raise ValueError(f"expected finite weights; those of {odd[0]} are not")
        if kind in _KINDS:
            return restored(kind, shape, description["parameters"], tensors)
    raise UnknownName("policy kind", kind, _KINDS)


def restored(kind: str, shape: ModelShape, parameters: Mapping, tensors: Mapping[str, torch.Tensor]) -> Policy:
    """A policy of a kind from what was saved of it.

    Raises:
        UnknownName: This version does not know the kind.
    """
    return _KINDS[check_known("policy kind", kind, _KINDS)].restore(shape, parameters, tensors)
