"""Fixture: folders with a small random model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rap_env.llm.loading import build_random_llm
from tests.llm.checkpoint_cases import OPT_SIZES, SIZES


@pytest.fixture
def save(tmp_path) -> Callable[..., Path]:
    """Saves a random model with further config entries, by default a Llama; returns the folder."""

    def to_folder(family: str = "llama", max_shard_size: str = "1GB", **options) -> Path:
        sizes = OPT_SIZES if family == "opt" else SIZES
        llm, folder = build_random_llm(family, sizes | options), tmp_path / "model"
        llm.model.save_pretrained(folder, max_shard_size=max_shard_size)
        llm.tokenizer.save_pretrained(folder)
        return folder

    return to_folder
