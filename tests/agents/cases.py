"""What searches are tested on: rules whose optima are known, and scenarios to search for."""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from agents.base import Agent, Learner, Task
from rap_env.evaluation.evaluator import Evaluation
from rap_env.evaluation.meter import TokenBudget
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.importance.gsi import ImportanceRanking
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.scenario import Scenario, ScenarioSampler, scenario_grid
from rap_env.policies import Policy
from rap_env.problem import PruningProblem
from tests.conftest import TOY_WINDOWS, CountingEvaluator

CONF = Path(__file__).parents[2] / "conf" / "agent"
WITHOUT_LIMIT = 10**9


class LastIsLeast(CountingEvaluator):
    """Scores by a rule that contradicts the components' own order: component i of 8 costs (8 - i) / 36."""

    identity = {"evaluator": "last is least"}

    def evaluation_of(self, mask: PruningMask) -> Evaluation:
        score = self.rule(mask.keep)
        return Evaluation(score, {"toy": {"acc": score, "smooth_acc": score, "items": 1}}, tokens=1, seconds=0.0)

    @staticmethod
    def rule(keep: Sequence[bool]) -> float:
        return score_of(keep)


class Neighbours(LastIsLeast):
    """Components cost what they cost alone, and more where their neighbour is gone too."""

    identity = {"evaluator": "neighbours"}

    @staticmethod
    def rule(keep: Sequence[bool]) -> float:
        return interacting(keep)


class EachCosts(LastIsLeast):
    """Every component costs something, in no order that anybody knows, and neighbours more together."""

    identity = {"evaluator": "each costs"}

    @staticmethod
    def rule(keep: Sequence[bool]) -> float:
        costs = np.random.default_rng(0).uniform(0.02, 0.2, len(keep))
        dropped = ~np.array(keep, dtype=bool)
        return float(1.0 - costs[dropped].sum() - 0.05 * (dropped[1:] & dropped[:-1]).sum())


class Expensive(LastIsLeast):
    """320 tokens for each mask: twenty times those of a calibration window."""

    identity = {"evaluator": "expensive"}

    def tokens(self, llm) -> int:
        return 320


def score_of(keep: Sequence[bool]) -> float:
    return 1.0 - sum(8 - position for position, bit in enumerate(keep) if not bit) / 36


def interacting(keep: Sequence[bool]) -> float:
    dropped = [not bit for bit in keep]
    return score_of(keep) - 0.1 * sum(first and second for first, second in itertools.pairwise(dropped))


def optimum(shape, scenario: Scenario) -> float:
    """The best score of all 256 masks that fit."""
    candidates = (PruningMask.from_bits(shape, bits) for bits in itertools.product((0, 1), repeat=8))
    return max(score_of(mask.keep) for mask in candidates if fits(mask, shape, scenario))


def fits(mask: PruningMask, shape, scenario: Scenario) -> bool:
    return footprint(shape, mask, scenario.workload).peak_bytes <= scenario.budget_bytes


def decided(policy: Policy, scenarios: Sequence[Scenario]) -> list[PruningMask]:
    return [policy.decide(scenario.workload, scenario.budget_bytes) for scenario in scenarios]


def mean_score(policy: Policy, scenarios: Sequence[Scenario], rule: Callable = score_of) -> float:
    return float(np.mean([rule(mask.keep) for mask in decided(policy, scenarios)]))


def names_of(llm) -> list[str]:
    return [component.name for component in llm.shape.components]


def by_rule(monkeypatch, rule: Callable[[tuple[str, ...]], float]) -> None:
    """Makes every calibration loss, and what block influence screens by, a rule on the names of what is dropped."""

    def evaluate_many(self, llm, masks, near=None):
        for mask in masks:
            yield mask, Evaluation(-rule(tuple(c.name for c in mask.dropped)), {}, self.tokens(llm), 0.0)

    def influences(meter, parts):
        return [rule(tuple(site.name for site in part)) for part in parts]

    monkeypatch.setattr(PerplexityEvaluator, "evaluate_many", evaluate_many)
    monkeypatch.setattr("rap_env.importance.lazy.block_influence", influences)


def make_task(
    llm,
    limit: int = WITHOUT_LIMIT,
    evaluator: CountingEvaluator | None = None,
    order: Sequence[str] | None = (),
    workloads: Sequence[tuple[int, int]] = ((1, 128), (4, 512), (16, 2048)),
    ratios: Sequence[float] = (0.9, 0.8, 0.7, 0.6),
    known: dict[PruningMask, float] | None = None,
    **options,
) -> Task:
    """A task whose order is given for nothing, by default the components' own, the worst one for `LastIsLeast`.

    With an order of None the ranking is measured.
    """
    problem = PruningProblem(llm, evaluator or LastIsLeast(), options.pop("store", None), budget=TokenBudget(limit))
    sampler = ScenarioSampler(batch_size=(1, 16), prompt_tokens=(128, 2048), budget_ratio=(0.6, 0.95))
    scenarios = scenario_grid(llm.shape, workloads, ratios)
    task = Task(problem, TOY_WINDOWS, sampler, scenarios, **{"seed": 0} | options)
    if order is not None:
        ranking = ImportanceRanking(
            tuple(order) or tuple(names_of(llm)), (), 0.0, {}, dict.fromkeys(names_of(llm), 1.0), known or {}, 0, 0, 0.0
        )
        task.__dict__["ranking"] = ranking
    return task


SMALLER = {
    "family_surrogate": {"answer.contexts": 12},
    "family_surrogate_short": {"answer.contexts": 12},
    "family_gradient": {"answer.steps": 40, "answer.contexts": 64},
    "family_noise": {"answer.contexts": 6, "answer.draws": 4},
    **{f"family_{name}": {"answer.learner.total_episodes": 30} for name in ("ppo", "sac", "td3")},
    **{f"family_{name}": {"answer.learner.total_steps": 64, "answer.contexts": 2} for name in ("dqn", "maskable_ppo")},
}


@functools.cache
def _config(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def build_agent(name: str, **changes) -> Agent:
    """The agent of a YAML; what is made of a search over a family is made quicker."""
    changes = SMALLER.get(name, {}) | changes
    return instantiate(_config(name, *(f"{key}={value}" for key, value in changes.items())))


def _target_of(name: str) -> str:
    """Without composing, which is slow for so many."""
    config = OmegaConf.load(CONF / f"{name}.yaml")
    return config.get("_target_") or _target_of(config.defaults[0])


def own_agents() -> list[str]:
    """Names of the YAMLs whose agents ask, or search nothing; learners are tested elsewhere."""
    names = sorted(path.stem for path in CONF.glob("*.yaml"))
    return [name for name in names if not issubclass(get_class(_target_of(name)), Learner)]
