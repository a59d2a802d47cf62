"""What all pruning environments share: scenario, step, info and rendering; and what those with a ranking share."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded

from rap_env.envs.defaults import EMBEDDED, EVALUATIONS, default_importance, default_problem
from rap_env.envs.render import Scene, render_ansi
from rap_env.errors import InvalidConfig, check_known
from rap_env.importance.source import ImportanceSource
from rap_env.mask import PruningMask, full_order
from rap_env.memory.footprint import Footprint, check_feasible, dense_bytes, footprint
from rap_env.memory.scenario import Scenario, ScenarioSampler
from rap_env.memory.workload import Workload
from rap_env.observation import observation_space, observe
from rap_env.problem import Outcome, PruningProblem


class MaskEnv(gymnasium.Env):
    """Holds one scenario and the mask that is being built for it; subclasses define the actions.

    A step has two halves, so that a vector environment can evaluate the masks of many environments between them: `act`
    changes the mask, `finish` pays. A mask is evaluated when its episode ends, and only then.

    Attributes:
        scenario: What the present episode is about; None before the first reset.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}

    def __init__(
        self,
        problem: PruningProblem | None = None,
        sampler: ScenarioSampler | None = None,
        render_mode: str | None = None,
        evaluation: str = EMBEDDED,
    ) -> None:
        self._evaluation = check_known("evaluation", evaluation, EVALUATIONS)
        if render_mode is not None:
            check_known("render mode", render_mode, self.metadata["render_modes"])
        self.problem = problem or default_problem(evaluation)
        self.sampler = sampler or ScenarioSampler()
        self.shape = self.problem.shape
        self.sampler.check(self.shape)
        self.render_mode = render_mode
        self.scenario: Scenario | None = None
        self._mask = self._dense = PruningMask.all_kept(self.shape)
        _ = self._dense.widths  # once, for all episodes begin with it
        self._outcome: Outcome | None = None
        self._is_running = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        given = (options or {}).get("scenario")
        if given is not None:
            check_feasible(self.shape, given.workload, given.budget_bytes)
        self.scenario = given or self.sampler.sample(self.shape, self.np_random)
        self._mask, self._outcome = self._dense, None
        self._is_running = True
        return self._observe(), self._info()

    def step(self, action):
        if not self._is_running:
            raise ResetNeeded("there is no running episode: call reset before the next step")
        ends = self.act(action)
        return self.finish(*ends, self.problem.evaluate(*self.case) if any(ends) else None)

    def act(self, action) -> tuple[bool, bool]:
        """Changes the mask as the action says, and tells whether that terminates or truncates the episode.

        Raises:
            InvalidMask: The action is not in the space; the mask stays as it was.
        """
        raise NotImplementedError

    @property
    def case(self) -> tuple[PruningMask, Workload, int]:
        """What the problem is asked when the episode ends: mask, workload, budget in bytes."""
        return self._mask, self.scenario.workload, self.scenario.budget_bytes

    def finish(self, terminated: bool, truncated: bool, outcome: Outcome | None):
        """Ends the step that `act` began and returns what `step` returns; an outcome belongs to an episode's end."""
        self._outcome, self._is_running = outcome, outcome is None
        reward = self.problem.reward(outcome) if outcome else 0.0
        return self._observe(), reward, terminated, truncated, self._info()

    def _observe(self) -> dict[str, np.ndarray]:
        """The observation of the present scenario and mask."""
        raise NotImplementedError

    def _footprint(self) -> Footprint:
        """Bytes of the present mask; the outcome's own once it is evaluated."""
        return self._outcome.footprint if self._outcome else footprint(self.shape, self._mask, self.scenario.workload)

    def _info(self) -> dict[str, Any]:
        needed = self._footprint()
        info: dict[str, Any] = {
            "scenario": self.scenario,
            "mask": self._mask,
            "footprint": needed.as_dict(),
            "overshoot_bytes": max(0, needed.peak_bytes - self.scenario.budget_bytes),
        }
        if self._outcome is not None:
            info |= {
                # copies: the outcome's own are shared by all steps that ask about this mask
                "tasks": {name: dict(metrics) for name, metrics in self._outcome.evaluation.tasks.items()},
                "reward_terms": self._outcome.reward_terms,
                "seconds": self._outcome.evaluation.seconds,
                "outcome": self._outcome,
            }
        return info

    def render(self) -> str | np.ndarray | None:
        if self.render_mode is None or self.scenario is None:
            return None
        outcome, workload = self._outcome, self.scenario.workload
        tasks = outcome.evaluation.tasks if outcome else {}
        scene = Scene(
            mask=self._mask,
            workload=workload,
            footprint=self._footprint(),
            dense_bytes=dense_bytes(self.shape, workload),
            budget_bytes=self.scenario.budget_bytes,
            reward=self.problem.reward(outcome) if outcome else None,
            accuracy={name: metrics.get("acc", float("nan")) for name, metrics in tasks.items()},
        )
        if self.render_mode == "ansi":
            return render_ansi(scene)
        from rap_env.envs.render_pixels import render_rgb  # here, so that only pictures need matplotlib

        return render_rgb(scene)


class RankedMaskEnv(MaskEnv):
    """A `MaskEnv` that observes an importance ranking and acts on components."""

    def __init__(self, importance: ImportanceSource | None = None, gsi: str = "static", **arguments: Any) -> None:
        self._gsi = check_known("gsi mode", gsi, ("static", "current"))
        super().__init__(**arguments)
        if self.sampler.kinds:
            raise InvalidConfig("sampler: expected workloads of no kind of text, which rap/Width-v0 alone observes")
        self.importance = importance or default_importance(self._evaluation)
        full_order(self.shape.components, self.importance.static)
        self.observation_space = observation_space(self.shape)

    def _observe(self) -> dict[str, np.ndarray]:
        order = self.importance.static if self._gsi == "static" else self.importance.current(self._mask)
        return observe(self.shape, self.scenario, self._mask, order)
