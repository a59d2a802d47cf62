"""Fixtures: two tiny models, and a record of what is really measured."""

import pytest

from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.evaluation.store import ResultStore
from rap_env.importance.gsi import greedy_sequential_importance
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
    measurements, evaluate_many = [], PerplexityEvaluator.evaluate_many

    def record(self, llm, masks, near=None):
        for mask, evaluation in evaluate_many(self, llm, masks, near):
            measurements.append(Measurement(self.windows.numel(), tuple(row.name for row in mask.dropped)))
            yield mask, evaluation

    monkeypatch.setattr(PerplexityEvaluator, "evaluate_many", record)
    return measurements
