"""Fixtures: tiny fakes for unit tests, the embedded model for those that are about it."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch

from agents.base import Task
from rap_env.evaluation.evaluator import Evaluation, Evaluator
from rap_env.evaluation.meter import Meter, TokenBudget
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.importance.gsi import CALIBRATION
from rap_env.importance.source import ImportanceSource
from rap_env.llm.embedded import EMBEDDED_NAME, cache_folder
from rap_env.llm.loading import build_tiny_llm, load_llm
from rap_env.mask import PruningMask
from rap_env.memory.scenario import ScenarioSampler, scenario_grid
from rap_env.problem import PruningProblem

TOY_WINDOWS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


class CountingEvaluator(Evaluator):
    """Scores a mask by a known rule instead of running anything: 1 minus the weights of what is dropped.

    Component i of n costs (i + 1) / (n (n + 1) / 2), so that the best masks are known.

    An evaluation costs one token.

    Attributes:
        calls: Masks that were evaluated.
    """

    name = "toy"

    def __init__(self) -> None:
        self.calls = 0

    @property
    def identity(self) -> Mapping:
        return {"evaluator": "counting"}

    def tokens(self, llm) -> int:
        return 1

    def evaluate_many(
        self, llm, masks: Sequence[PruningMask], near: PruningMask | None = None
    ) -> Iterator[tuple[PruningMask, Evaluation]]:
        for mask in masks:
            self.calls += 1
            yield mask, self.evaluation_of(mask)

    def evaluation_of(self, mask: PruningMask) -> Evaluation:
        n = len(mask.keep)
        dropped = sum(position + 1 for position, bit in enumerate(mask.keep) if not bit)
        score = 1.0 - dropped / (n * (n + 1) / 2)
        return Evaluation(score, {"toy": {"acc": score, "smooth_acc": score, "items": 1}}, tokens=1, seconds=0.0)


@pytest.fixture(scope="session")
def tiny_llm():
    """A random Llama of 4 layers, 8 components; leave it dense."""
    return build_tiny_llm()


@pytest.fixture
def toy_problem(tiny_llm) -> PruningProblem:
    """The tiny model evaluated by `CountingEvaluator`, without a store."""
    return PruningProblem(tiny_llm, CountingEvaluator())


@pytest.fixture
def toy_importance(tiny_llm) -> ImportanceSource:
    """The order that `CountingEvaluator` makes the best one, with a meter on random windows."""
    order = [component.name for component in tiny_llm.shape.components]
    return ImportanceSource(order, Meter(tiny_llm, PerplexityEvaluator(TOY_WINDOWS, CALIBRATION)))


@pytest.fixture
def toy_sampler() -> ScenarioSampler:
    return ScenarioSampler(batch_size=(1, 16), prompt_tokens=(128, 2048), budget_ratio=(0.6, 0.95))


@pytest.fixture
def toy_task(tiny_llm, toy_sampler) -> Callable[..., Task]:
    """Makes tasks: `toy_task(token_budget, evaluator=..., store=..., seed=...)`; the ranking is on random windows."""

    def make(token_budget: int, evaluator: Evaluator | None = None, store=None, **options) -> Task:
        budget = TokenBudget(token_budget)
        problem = PruningProblem(tiny_llm, evaluator or CountingEvaluator(), store, budget=budget)
        scenarios = scenario_grid(tiny_llm.shape, [(1, 512), (16, 2048)], [0.9, 0.75])
        return Task(problem, TOY_WINDOWS, toy_sampler, scenarios, **{"seed": 0} | options)

    return make


@pytest.fixture(scope="session")
def embedded_folder():
    """Folder of the embedded model; `make test` puts it there."""
    folder = cache_folder() / "models" / EMBEDDED_NAME
    if not (folder / "config.json").is_file():
        pytest.skip("the embedded model is not in the cache folder: run `make model`")
    return folder


@pytest.fixture(scope="session")
def embedded_llm(embedded_folder):
    """SmolLM2-135M in bfloat16; leave it dense."""
    return load_llm(EMBEDDED_NAME, device="cpu")


@pytest.fixture(scope="session")
def embedded_llm_float32(embedded_folder):
    """SmolLM2-135M in float32; leave it dense."""
    return load_llm(EMBEDDED_NAME, dtype="float32", device="cpu")
