"""EvoPress (arXiv 2410.14649): one parent, offspring by swaps, selected from cheap to dear."""

import numpy as np

from agents.base import SearchResult, Task
from agents.grains import GRAINS, STARTS, Grain, check_known
from agents.scenario_judge import ScenarioJudge
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.mask import PruningMask
from rap_env.problem import PruningProblem
from rap_env.staged import Stage, select_in_stages

_INITIALLY_GENERATED = 64  # random candidates that the first parent is selected from, as the paper's depth pruning does
_MOST_SWAPS = 3  # a mutation makes min(U{1..3}, U{1..3}) of them: mostly one


class EvopressAgent:
    """An elitist (1 + lambda) search by swaps, for one reported scenario after another.

    Each generation the parent has `offspring` mutants. The first stage judges them by calibration loss on a few windows
    and lets `survivors` pass; the task's problem judges these, and the best takes the parent's place unless it is
    worse. The paper's fitness is the KL divergence to the dense model on 2,048 tokens, then on 32,768; ours is the
    loss, then the score that all agents are compared by.

    The evaluation budget counts both stages in tokens: a candidate of the first one costs its windows' tokens divided
    by those of a full evaluation, so that 384 evaluations are equally many forwarded tokens for this agent and for one
    without stages. The problem's own count holds the full ones only, `SearchResult.calibration_tokens` the others. A
    first stage that would cost as much as the second is left out. The budget is shared equally among the scenarios.

    Args:
        grain: `"block"` (attentions are also traded for MLPs, masks fit the bytes), `"equal_counts"` (the paper's: as
            many attentions dropped as MLPs, swaps within a kind) or `"layer"` (the paper's: whole layers).
        start: `"random"`, the best of 64 random masks (the paper's), or `"greedy"`, the importance order's mask.
        generations: For each scenario, at most; the paper takes k (n - k) / 1.5 for k of n layers.
        offspring: Mutants in a generation.
        survivors: How many of them the task's problem judges.
        cheap_windows: Calibration windows of the first stage, at most as many as there are; 0 for no such stage.

    Raises:
        UnknownName: No such grain or start.
        ValueError: No offspring, no survivor, or less than no window.
    """

    def __init__(
        self,
        grain: str = "block",
        start: str = "random",
        generations: int = 160,
        offspring: int = 32,
        survivors: int = 2,
        cheap_windows: int = 1,
    ) -> None:
        if offspring < 1 or survivors < 1 or cheap_windows < 0:
            raise ValueError(
                "expected offspring and survivors of at least 1 and cheap_windows of at least 0;"
                f" got {offspring}, {survivors} and {cheap_windows}"
            )
        self._grain = check_known("grain", grain, GRAINS)
        self._start = check_known("start", start, STARTS)
        self._generations, self._offspring, self._survivors = generations, offspring, survivors
        self._cheap_windows = cheap_windows

    def search(self, task: Task) -> SearchResult:
        judge, generator = ScenarioJudge(task), np.random.default_rng(task.seed)
        selection = _Selection(task, judge, self._survivors, self._cheap_windows)
        for grain in judge.turns(self._grain):
            if self._start == "greedy":
                candidates = [grain.greedy(task.importance.static)]
            else:
                candidates = [grain.random(generator) for _ in range(_INITIALLY_GENERATED)]
            self._evolve(candidates, grain, selection, generator)
        return judge.result()

    def _evolve(
        self, candidates: list[np.ndarray], grain: Grain, selection: "_Selection", generator: np.random.Generator
    ) -> None:
        """Runs generations until they are done, the share is used up, or there is no other mask."""
        parent, fitness = None, -np.inf
        for _ in range(1 + self._generations):
            bits = {mask: keep for keep in candidates if (mask := grain.mask(keep)) != parent}
            selected = selection.best_of(list(bits), grain)
            if selected is None:
                return
            mask, reward = selected
            if reward >= fitness:
                parent, fitness, parent_bits = mask, reward, bits[mask]
            candidates = [mutate(parent_bits, grain, generator) for _ in range(self._offspring)]


def mutate(parent: np.ndarray, grain: Grain, generator: np.random.Generator) -> np.ndarray:
    """Swaps: a dropped and a kept bit of one kind change places, mostly once.

    Where the grain trades, every other swap is of any two kinds. It may free too few bytes or more than it takes: then
    the grain's repair drops or restores others at random.
    """
    child = parent.copy()
    for _ in range(generator.integers(1, _MOST_SWAPS + 1, size=2).min()):
        if child.all():
            break
        restored = generator.choice(np.flatnonzero(~child))
        trade = grain.trades and generator.random() < 0.5
        partners = np.flatnonzero(child & (trade | (grain.kinds == grain.kinds[restored])))
        if len(partners):
            child[restored], child[generator.choice(partners)] = True, False
    return grain.repair(child, generator)


class _Selection:
    """Two stages: calibration loss on a few windows, then the task's problem.

    Args:
        task: Has the problem and the calibration windows.
        judge: The second stage; its shares pay for both.
        survivors: How many pass the first stage.
        n_windows: Windows of the first stage; 0 for none.
    """

    def __init__(self, task: Task, judge: ScenarioJudge, survivors: int, n_windows: int) -> None:
        windows = task.windows[:n_windows]
        self._cheap_tokens = windows.numel()
        evaluator = PerplexityEvaluator(windows, "calibration")
        self._cheap = Stage(PruningProblem(task.problem.llm, evaluator, task.problem.store), survivors)
        self._judge = judge

    def best_of(self, masks: list[PruningMask], grain: Grain) -> tuple[PruningMask, float] | None:
        """The best of the survivors and its reward; None when the share does not pay for another candidate."""
        if not self._judge.rewards:
            self._judge.judge(masks[:1])  # from now on it is known how many tokens an evaluation takes
        finalists = self._survivors_of(masks, grain)
        rewards = self._judge.judge(finalists)
        return max(zip(finalists, rewards, strict=False), key=lambda judged: judged[1], default=None)

    def _survivors_of(self, masks: list[PruningMask], grain: Grain) -> list[PruningMask]:
        price = self._cheap_tokens / self._judge.evaluation_tokens
        if not 0 < price < 1:
            return masks
        costs = ((n, n * price + min(n, self._cheap.survivors)) for n in range(1, len(masks) + 1))
        paid = max((n for n, cost in costs if cost <= self._judge.left), default=0)
        scenario = grain.scenario
        passed = select_in_stages([self._cheap], masks[:paid], scenario.workload, scenario.budget_bytes)
        self._judge.calibration_tokens = self._cheap.problem.budget.spent * self._cheap_tokens
        return [mask for mask, _outcome in passed]
