"""Fixtures: MLPs in parts of a few channels, and whether llama.cpp can be asked."""

import sys

import pytest
from transformers import dynamic_module_utils

from rap_env.export import llama_cpp
from rap_env.llm import parts
from tests.export.cases import GROUP


@pytest.fixture(scope="package", autouse=True)
def small_groups():
    """The small models here have 64 MLP channels: parts of 16, 24 and 24."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "GROUP_CHANNELS", GROUP)
        yield


@pytest.fixture(scope="package", autouse=True)
def own_module_cache(tmp_path_factory):
    """Where transformers copies the code of checkpoints: not where other processes do at the same time."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("modules")
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.setattr("sys.path", list(sys.path))
        yield folder


@pytest.fixture
def llama_cpp_reads():
    if not llama_cpp.is_installed():
        pytest.skip(f"{llama_cpp.LIBRARY}, which runs llama.cpp, is not installed: pip install -e '.[dev]'")
