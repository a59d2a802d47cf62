"""Fixtures: two tiny models, and a record of what meters really measure."""

import pytest

from rap_env.evaluation.store import ResultStore
from rap_env.importance.gsi import greedy_sequential_importance
from rap_env.importance.trials import RemovalMeter
from rap_env.llm.loading import build_tiny_llm
from tests.importance.cases import WINDOWS, Measurement


@pytest.fixture(scope="package", params=["llama", "opt"])
def llm(request):
    """A random model of 4 layers, 8 components; leave it dense."""
    return build_tiny_llm(request.param, seed=3)


@pytest.fixture(scope="package")
def ranking(llm):
    """The exact rule's full ranking."""
    return greedy_sequential_importance(llm, WINDOWS, exact=True)


@pytest.fixture(scope="package")
def lazy(llm):
    """The lazy rule's full ranking."""
    return greedy_sequential_importance(llm, WINDOWS)


@pytest.fixture
def store(tmp_path):
    with ResultStore(tmp_path / "results.db") as store:
        yield store


@pytest.fixture
def measured(monkeypatch) -> list[Measurement]:
    """Every loss that is really measured, the dense ones too; what is read from a store is none."""
    measurements, keep = [], RemovalMeter._keep

    def record(self, mask, trial):
        measurements.append(Measurement(self.tokens_per_trial, tuple(component.name for component in mask.dropped)))
        return keep(self, mask, trial)

    monkeypatch.setattr(RemovalMeter, "_keep", record)
    return measurements
