"""The compiled kernels of few rows that this processor runs."""

from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from rap_env.llm import few_rows


class Kernels(NamedTuple):
    """Those of one processor; `pairs` of bfloat16 numbers are multiplied by an instruction or not."""

    module: ModuleType | None
    pairs: bool


def _param(processor: str, runs: bool, pairs: bool = False) -> object:
    module = few_rows.built_for(processor) if runs else None
    reason = "built without a C compiler" if runs else "no such CPU"
    skipped = pytest.mark.skipif(module is None, reason=reason)
    return pytest.param(Kernels(module, pairs), marks=skipped, id=processor + ", pairs" * pairs)


_VECTORS = torch.backends.cpu.get_cpu_capability()
KERNELS = [
    _param("AVX2", _VECTORS in ("AVX2", "AVX512")),
    _param("AVX512", _VECTORS == "AVX512"),
    _param("AVX512", few_rows._PAIRS, pairs=True),
]
NATIVE = pytest.mark.skipif(few_rows._few_rows is None, reason="built without a C compiler, or no such CPU")
