"""What a stored result depends on beside mask and evaluator: our engine, the machine's arithmetic, model, libraries."""

import functools
import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

from rap_env.llm.widened import widens

# Raise it with every change after which our code computes other numbers for the same mask, model and evaluator: the
# forward pass under masks, packing, scoring, the weights of a metric. Results of earlier versions are then misses.
ENGINE_VERSION = 4

# Prefixes of the CPU features by which PyTorch, oneDNN and MKL choose their kernels, on x86 and on ARM.
_KERNEL_FEATURES = ("sse4", "avx", "fma", "f16c", "amx", "asimd", "fphp", "bf16", "i8mm", "sve")


def engine_identity(llm: Any) -> dict:
    """The part of an evaluation's identity that is the same for all masks and evaluators.

    Args:
        llm: Has `digest`, `tokenizer_digest`, `dtype` and `device`.
    """
    return {
        "engine": ENGINE_VERSION,
        "platform": numeric_platform(llm.device),
        "model": llm.digest,
        "tokenizer": llm.tokenizer_digest,
        "dtype": str(llm.dtype),
        "versions": {name: _version(name) for name in ("torch", "transformers")},
    } | ({"linear layers": "float32"} if widens(llm) else {})


_version = functools.cache(importlib.metadata.version)


def numeric_platform(device: torch.device | str) -> dict:
    """What floating-point results depend on beside the code: two machines that differ here may round differently.

    Returns:
        For a CPU its maker and features, the build of PyTorch with its BLAS and oneDNN, and the number of its threads:
        streams are cut into as many lanes, and matrix products of other sizes round differently. For a GPU its name and
        the versions of its libraries. The same in all processes of a machine that use as many threads.
    """
    found = dict(_platform(torch.device(device).type, str(device)))
    return found | {"threads": torch.get_num_threads()} if found["device"] == "cpu" else found


@functools.cache
def _platform(kind: str, device: str) -> dict:
    if kind == "cuda":
        return {
            "device": kind,
            "name": torch.cuda.get_device_name(device),
            "capability": list(torch.cuda.get_device_capability(device)),
            "runtime": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
        }
    build = hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:16]  # names BLAS, oneDNN and the kernels used
    return {"device": kind, "machine": platform.machine(), "build": build, **_cpu_features()}


def _cpu_features() -> dict:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():  # not Linux
        return {"processor": platform.processor()}
    first = cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    features = fields.get("flags") or fields.get("Features") or ""
    return {
        "maker": fields.get("vendor_id") or fields.get("CPU implementer"),  # MKL has other kernels for each
        "features": sorted({name for name in features.split() if name.startswith(_KERNEL_FEATURES)}),
    }
