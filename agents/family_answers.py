"""How a search over a family answers in the end: what a policy is made of, once nothing more is evaluated."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from agents.base import Learner
from agents.family_critic import FamilyCritic
from rap_env.memory.projection import Projection
from rap_env.policies import ArchivePolicy, Policy


class Answer(Protocol):
    """Makes a policy of what a search knows."""

    def policy(self, critic: FamilyCritic, details: dict[str, Any]) -> Policy:
        """The policy; what a record should keep beside it goes into `details`."""


class ClimbedTable:
    """A table of what climbs predict to be best, for contexts of the family.

    An evaluated mask stands in it only where it is predicted to be best: one that was lucky on the text it was
    evaluated on is not believed.

    Args:
        contexts: That it is made for.
        climbs: Steps of a climb, in each of which 48 masks are looked at.
    """

    def __init__(self, contexts: int = 192, climbs: int = 40) -> None:
        self._contexts, self._climbs = contexts, climbs

    def policy(self, critic: FamilyCritic, details: dict[str, Any]) -> ArchivePolicy:
        generator = np.random.default_rng([critic.task.seed, 2])
        contexts = critic.contexts(self._contexts)
        return critic.table([(each, critic.climb(each, generator, self._climbs)) for each in contexts])


class NoiseTable:
    """The best of many random actions for each context, by the critic: what a learner explores with, and no network.

    Args:
        contexts: That the table is made for.
        draws: Actions for each of them, from a normal distribution around equal widths.
        noise: Its standard deviation.
        projection: Arguments of `Projection`.
    """

    def __init__(self, contexts: int, draws: int, noise: float, projection: Mapping[str, Any]) -> None:
        self._contexts, self._draws, self._noise = contexts, draws, noise
        self._projection = Projection(**projection)

    def policy(self, critic: FamilyCritic, details: dict[str, Any]) -> ArchivePolicy:
        generator, answers = np.random.default_rng([critic.task.seed, 2]), []
        shape = critic.shape
        for context in critic.contexts(self._contexts):
            actions = generator.normal(0.0, self._noise, (self._draws, len(shape.components.sites))).clip(-1.0, 1.0)
            masks = [self._projection.mask(shape, action, context.workload, context.budget_bytes) for action in actions]
            answers.append((context, masks[int(critic.logarithms(masks).argmin())]))
        return critic.table(answers)


class LearnedOnCritic:
    """Whatever a learner ends as, after training in environments that the critic answers for.

    Args:
        learner: As for the model itself.
        contexts: Its policy's masks for so many contexts are served as a table, each site's first parts instead of
            those that were chosen, as the critic sees them; 0 serves the policy itself.
    """

    def __init__(self, learner: Learner, contexts: int = 0) -> None:
        self._learner, self._contexts = learner, contexts

    def policy(self, critic: FamilyCritic, details: dict[str, Any]) -> Policy:
        learner = self._learner
        learner.begin(critic.training_task())
        learner.learn()
        details |= {"training": learner.details}
        policy = learner.policy()
        if not self._contexts:
            return policy
        contexts = critic.contexts(self._contexts)
        return critic.table([(each, policy.decide(each.workload, each.budget_bytes).nested) for each in contexts])
