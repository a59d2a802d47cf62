"""What every agent is: given a problem and an evaluation budget, it ends as a policy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from rap_env.importance.source import ImportanceSource
from rap_env.memory.scenario import Scenario, ScenarioSampler
from rap_env.policies import Policy
from rap_env.problem import PruningProblem


@dataclass(frozen=True)
class Task:
    """What an agent is given.

    Attributes:
        problem: Judges masks on the search half; its `budget` counts what the agent asks.
        importance: The static ranking, and a meter for more.
        sampler: Draws the scenarios that the policy shall serve.
        grid: Those of them that are known beforehand, as a rule the reported ones; searches for one scenario at a time
            share their budget among them.
        windows: Calibration tokens [N, T] that the ranking was measured on.
        seed: Seed of everything random in the agent.
        folder: Where it may keep checkpoints.
        progress: Called with (steps done, steps in all).
        log: Called with (step, metrics).
    """

    problem: PruningProblem
    importance: ImportanceSource
    sampler: ScenarioSampler
    grid: Sequence[Scenario]
    windows: torch.Tensor
    seed: int
    folder: Path
    progress: Callable[[int, int], None] = lambda done, total: None
    log: Callable[[int, dict[str, float]], None] = lambda step, metrics: None


@dataclass(frozen=True)
class SearchResult:
    """What an agent ends as.

    Attributes:
        policy: Maps (workload, budget) to a mask.
        evaluations: Distinct masks that it asked the problem about.
        seconds: Time of the search.
        details: Whatever else a record should keep.
        calibration_tokens: Tokens that it forwarded beside the problem's evaluations, for a ranking of its own.
    """

    policy: Policy
    evaluations: int
    seconds: float = field(compare=False)
    details: dict[str, Any] = field(default_factory=dict, compare=False)
    calibration_tokens: int = 0


class Agent(Protocol):
    """Chooses masks. One class and one YAML each; constructor arguments are the YAML's keys."""

    def search(self, task: Task) -> SearchResult:
        """Learns or computes a policy."""
