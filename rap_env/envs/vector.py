"""Vector environments: many pruning environments whose masks are evaluated together."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

from rap_env.envs.base import MaskEnv
from rap_env.envs.pruning import PruningEnv
from rap_env.envs.sequential import SequentialPruningEnv
from rap_env.envs.width import WidthEnv


class PruningVectorEnv(VectorEnv):
    """N `rap/Pruning-v0` whose masks are evaluated in one call, which runs what they have in common in front only once.

        envs = gymnasium.make_vec("rap/Pruning-v0", num_envs=16)  # further arguments: those of the single environment
        observations, infos = envs.reset(seed=0)
        observations, rewards, terminations, truncations, infos = envs.step(envs.action_space.sample())

    Shapes: N environments, n components. Rollouts are equal to those of `gymnasium.vector.SyncVectorEnv` over the same
    environments with the same seeds and autoreset mode. All environments share the problem, the importance and the
    sampler; each has its own random generator.

    **Actions and observations.** Those of the single environment, stacked: actions [N, n], observations a `Dict` of
    [N, 1] and [N, n]. `single_action_space` and `single_observation_space` are one environment's.

    **Evaluations.** `step` calls `PruningProblem.evaluate_many` once, with the masks of all episodes that end in it.
    Equal masks are measured once, known ones not at all. If the token budget does not cover the new ones,
    `SearchExhausted` is raised before anything is measured. A step that raises is lost: reset before going on.

    **Autoreset** is `AutoresetMode.SAME_STEP`: where an episode ends, `step` returns its reward and flags together with
    the next episode's first observation. With `NEXT_STEP` every second step of these one-step episodes would only
    reset: it would ignore the actions, evaluate nothing, and fill half of a rollout with empty transitions.

    **Infos.** Gymnasium's form: `infos[key]` holds the N values of a key of the single environment's info (where that
    is a dictionary, a dictionary of such arrays), and `infos["_" + key]` [N] tells which environments gave one. Where
    an episode ended, `infos["final_obs"][i]` is its last observation and `infos["final_info"]` its info, outcome
    included; all other keys are the new episode's, and so are rendered pictures.

    Args:
        num_envs: N.
        arguments: Those of the single environment; the defaults (model, tasks, ranking) are loaded once and shared.

    Attributes:
        envs: The N single environments; read them, but let this class step and reset them.

    Raises:
        ValueError: `num_envs` is not positive.
    """

    single_class: type[MaskEnv] = PruningEnv

    def __init__(self, num_envs: int = 1, **arguments) -> None:
        if num_envs < 1:
            raise ValueError(f"expected at least 1 environment; got num_envs={num_envs}")
        super().__init__()
        self.num_envs, self._is_running = num_envs, False
        self.envs = tuple(self.single_class(**arguments) for _ in range(num_envs))
        first = self.envs[0]
        self.problem, self.render_mode = first.problem, first.render_mode
        self.metadata = first.metadata | {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = first.observation_space
        self.single_action_space = first.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None):
        """Starts an episode in every environment.

        Args:
            seed: A number gives environment i the seed `seed + i`; a list has a seed (or None) for each; None goes on
                with the generators as they are.
            options: Handed to every environment: `{"scenario": Scenario(...)}` gives all of them the same one.

        Raises:
            ValueError: The list does not have N seeds.
        """
        if seed is None or isinstance(seed, int | np.integer):
            seed = [None if seed is None else int(seed) + index for index in range(self.num_envs)]
        self._check_length("seeds", seed)
        self._is_running = False  # until every environment is reset
        infos: dict[str, Any] = {}
        observations = []
        for index, env in enumerate(self.envs):
            observation, info = env.reset(seed=seed[index], options=options)
            observations.append(observation)
            infos = self._add_info(infos, info, index)
        self._is_running = True
        return self._stack(observations), infos

    def step(self, actions: np.ndarray):
        """Acts in every environment, evaluates the masks of the episodes that end, and starts the next ones.

        Args:
            actions: One action for each environment.

        Returns:
            Observations, rewards [N] float64, terminations [N] bool, truncations [N] bool, infos.

        Raises:
            ResetNeeded: There was no reset yet, or an earlier step raised an error.
            ValueError: There are not N actions.
            InvalidMask: An action is not in the space.
            SearchExhausted: The token budget does not cover the masks; none was measured.
        """
        self._check_length("actions", actions)
        if not self._is_running:
            raise ResetNeeded("there are no running episodes: call reset before the next step")
        self._is_running = False  # until the whole step is taken: an error leaves some environments in the middle of it
        ends = [env.act(action) for env, action in zip(self.envs, actions, strict=True)]
        ended = [env for env, flags in zip(self.envs, ends, strict=True) if any(flags)]
        outcomes = iter(self.problem.evaluate_many([env.case for env in ended]))
        infos: dict[str, Any] = {}
        observations, rewards = [], np.zeros(self.num_envs)
        for index, (env, flags) in enumerate(zip(self.envs, ends, strict=True)):
            outcome = next(outcomes) if any(flags) else None
            observation, rewards[index], _, _, info = env.finish(*flags, outcome)
            if outcome is not None:
                infos = self._add_info(infos, {"final_obs": observation, "final_info": info}, index)
                observation, info = env.reset()
            observations.append(observation)
            infos = self._add_info(infos, info, index)
        terminations, truncations = np.array(ends).T.copy()
        self._is_running = True
        return self._stack(observations), rewards, terminations, truncations, infos

    def render(self) -> tuple[str | np.ndarray | None, ...]:
        """What each environment renders."""
        return tuple(env.render() for env in self.envs)

    def close_extras(self, **_arguments) -> None:
        for env in getattr(self, "envs", ()):  # also called when the constructor has failed
            env.close()

    @property
    def np_random(self) -> tuple[np.random.Generator, ...]:
        """Each environment's generator."""
        return tuple(env.np_random for env in self.envs)

    @property
    def np_random_seed(self) -> tuple[int, ...]:
        """Each environment's seed."""
        return tuple(env.np_random_seed for env in self.envs)

    def _stack(self, observations: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        batch = create_empty_array(self.single_observation_space, self.num_envs)
        return concatenate(self.single_observation_space, observations, batch)

    def _check_length(self, name: str, values: Sequence) -> None:
        if len(values) != self.num_envs:
            raise ValueError(f"expected {self.num_envs} {name}, one for each environment; got {len(values)}")


class SequentialPruningVectorEnv(PruningVectorEnv):
    """N `rap/SequentialPruning-v0`; as `PruningVectorEnv`, with actions [N] of 0 to n.

    Most steps end no episode and so evaluate nothing. Masks are evaluated together when episodes end in the same step.
    """

    single_class = SequentialPruningEnv

    def action_masks(self) -> np.ndarray:
        """Booleans [N, n + 1], for MaskablePPO."""
        return np.stack([env.action_masks() for env in self.envs])


class WidthVectorEnv(PruningVectorEnv):
    """N `rap/Width-v0`; as `PruningVectorEnv`, with actions [N, S] for S sites."""

    single_class = WidthEnv
