"""Windows of text for the steps of a learner that reads the model: of the kinds that its contexts are of."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from agents.base import Task
from rap_env.errors import CorpusUnavailable, InvalidReward


class WindowBatches:
    """Draws the windows of steps: for each context one of its kind of text, each read once before any is read again.

    Args:
        task: Its windows, and the items that masks are searched on.
        generator: Draws.
        answers: How many windows of a step end with an item.

    Raises:
        InvalidReward: There are to be answers, and no item has any.
        CorpusUnavailable: Workloads are of a kind of text that no window is of.
    """

    def __init__(self, task: Task, generator: np.random.Generator, answers: int) -> None:
        problem, kinds = task.problem, np.array(task.window_kinds or [""] * len(task.windows))
        if missing := sorted(set(task.sampler.kinds) - set(kinds.tolist())):
            raise CorpusUnavailable(f"expected calibration text of each kind of workloads; none is of {missing[0]}")
        self._windows, self._generator, self._answers = task.windows, generator, answers
        self._rows = {kind: self._shuffled(np.flatnonzero(kinds == kind)) for kind in task.sampler.kinds}
        self._rows[""] = self._shuffled(np.arange(len(kinds)))  # of whatever kind
        self._items = problem.evaluator.right_answers(problem.llm) if answers else ()
        if answers and not self._items:
            raise InvalidReward(f"expected items with right answers to learn from; {problem.evaluator.name} has none")
        self._numbers = self._shuffled(np.arange(len(self._items)))

    def draw(self, kinds: Sequence[str]) -> tuple[torch.Tensor, list[int] | None]:
        """Windows [B, T] of B kinds, and how many of their last tokens are scored where these are not all."""
        drawn = self._windows[[next(self._rows[kind]) for kind in kinds]]
        if not self._answers:
            return drawn, None
        n_windows, n_tokens = drawn.shape
        n_scored = [n_tokens - 1] * n_windows
        # Places of a Sobol sequence lie in parts of the family of their own, so answers have no fixed ones.
        for place in self._generator.choice(n_windows, self._answers, replace=False):
            context, answer = self._items[next(self._numbers)]
            tokens = torch.tensor([*context, *answer])[-n_tokens:]
            drawn[place, -len(tokens) :], n_scored[place] = tokens, len(answer)
        return drawn, n_scored

    def _shuffled(self, rows: np.ndarray) -> Iterator[int]:
        """Rows in random order, again and again."""
        while True:
            yield from rows[self._generator.permutation(len(rows))].tolist()
