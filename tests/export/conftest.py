"""Fixtures: MLPs in parts of a few channels, and whether llama.cpp can be asked."""

import pytest

from rap_env.export import llama_cpp
from rap_env.llm import parts
from tests.export.cases import GROUP


@pytest.fixture(scope="package", autouse=True)
def small_groups():
    """The small models here have 64 MLP channels: parts of 16, 24 and 24."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "GROUP_CHANNELS", GROUP)
        yield


@pytest.fixture
def llama_cpp_reads():
    if not llama_cpp.is_installed():
        pytest.skip(f"{llama_cpp.LIBRARY}, which runs llama.cpp, is not installed: pip install -e '.[dev]'")
