"""Fixtures of the store's tests."""

from pathlib import Path

import pytest

from rap_env.evaluation.store import ResultStore


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "results.db"


@pytest.fixture
def store(path):
    with ResultStore(path) as opened:
        yield opened
