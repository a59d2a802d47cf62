"""The one way to learn how good a mask is."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from rap_env.errors import InvalidReward, SearchExhausted
from rap_env.evaluation.evaluator import Evaluation, Evaluator
from rap_env.evaluation.store import ResultStore
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.memory.footprint import Footprint, check_feasible, footprint
from rap_env.memory.workload import Workload
from rap_env.reward import overshoot_ratio, weighted_reward
from rap_env.rng import isolated_rng

REWARD_TERMS = ("accuracy", "smooth_accuracy", "overshoot", "violation")
ACCURACY_REWARD = {"accuracy": 1.0, "overshoot": -5.0}


@dataclass(frozen=True)
class Outcome:
    """What a mask is worth for one workload and memory budget.

    Attributes:
        evaluation: Quality of the masked model; does not depend on the workload.
        footprint: Bytes that it needs for the workload.
        budget_bytes: Bytes that it may need.
        from_store: Whether the evaluation was known already.
        seconds: Time that this call took.
    """

    evaluation: Evaluation
    footprint: Footprint
    budget_bytes: int
    from_store: bool = field(compare=False)
    seconds: float = field(compare=False)

    @property
    def score(self) -> float:
        return self.evaluation.score

    @property
    def fits(self) -> bool:
        return self.footprint.peak_bytes <= self.budget_bytes

    @property
    def reward_terms(self) -> dict[str, float]:
        """`accuracy` (the score), `smooth_accuracy`, `overshoot` (fraction of the budget) and `violation` (0 or 1)."""
        return {
            "accuracy": self.score,
            "smooth_accuracy": self.evaluation.mean("smooth_acc"),
            "overshoot": overshoot_ratio(self.footprint.peak_bytes, self.budget_bytes),
            "violation": float(not self.fits),
        }


class EvaluationBudget:
    """Counts the distinct masks that a search asks about, whether or not the store knows them already.

    So a search on a warm store spends exactly what it would spend on an empty one.

    Args:
        limit: Masks that may be asked about; None for any number.

    Attributes:
        asked: Digests of the masks asked about.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.asked: set[str] = set()

    @property
    def spent(self) -> int:
        return len(self.asked)

    @property
    def left(self) -> int | None:
        """Masks that may still be asked about; None for any number."""
        return None if self.limit is None else self.limit - self.spent

    @property
    def exhausted(self) -> bool:
        return self.limit is not None and self.spent >= self.limit

    def spend(self, masks: Iterable[PruningMask]) -> None:
        """Counts masks, each once.

        Raises:
            SearchExhausted: More of them are new than the limit leaves; none was counted.
        """
        new = {mask.digest for mask in masks} - self.asked
        if self.limit is not None and self.spent + len(new) > self.limit:
            raise SearchExhausted(
                f"{self.spent} of {self.limit} evaluations are used up; {len(new)} more were asked for"
            )
        self.asked |= new


class PruningProblem:
    """A model, a judge and a store; environments, searches and reports all ask here.

    Args:
        llm: The model; the mask that is applied to it does not matter, and stays.
        evaluator: Judges masked models.
        store: Keeps finished evaluations; None keeps them in memory only.
        reward_weights: Weights of the terms in `Outcome.reward_terms`.
        budget: Counts what is asked; by default without limit.

    Raises:
        InvalidReward: A weight names no term.
    """

    def __init__(
        self,
        llm: SwitchableLLM,
        evaluator: Evaluator,
        store: ResultStore | None = None,
        reward_weights: Mapping[str, float] = ACCURACY_REWARD,
        budget: EvaluationBudget | None = None,
    ) -> None:
        for name in reward_weights:
            if name not in REWARD_TERMS:
                raise InvalidReward(f"no reward term {name!r}; known terms: {', '.join(REWARD_TERMS)}")
        self.llm = llm
        self.shape = llm.shape
        self.evaluator = evaluator
        self.store = store
        self.reward_weights = dict(reward_weights)
        self.budget = budget or EvaluationBudget()
        self.fresh_evaluations = 0
        self._known: dict[str, Evaluation] = {}

    def with_budget(self, budget: EvaluationBudget | None = None) -> "PruningProblem":
        """The same model, judge, store and reward with a count of its own; by default without limit."""
        return self.judged_by(self.evaluator, budget)

    def judged_by(self, evaluator: Evaluator, budget: EvaluationBudget | None = None) -> "PruningProblem":
        """The same model, store and reward with another judge and a count of its own; by default without limit."""
        return PruningProblem(self.llm, evaluator, self.store, self.reward_weights, budget)

    def check_budget(self, workload: Workload, budget_bytes: int) -> None:
        """Refuses what no mask can meet, before any work is done.

        Raises:
            InfeasibleBudget: Even with every component dropped the footprint exceeds the budget.
            InvalidWorkload: The workload is beyond the model's context.
        """
        check_feasible(self.shape, workload, budget_bytes)

    def evaluate(self, mask: PruningMask, workload: Workload, budget_bytes: int) -> Outcome:
        """Judges a mask for a workload and a budget; raises what `evaluate_many` raises."""
        return self.evaluate_many([(mask, workload, budget_bytes)])[0]

    def evaluate_many(self, cases: Sequence[tuple[PruningMask, Workload, int]]) -> list[Outcome]:
        """Judges masks for workloads and budgets; those that are not known yet are judged together.

        The outcomes are equal to the bit to those of judging one after the other.

        Raises:
            InfeasibleBudget: No mask can meet a budget.
            InvalidWorkload: A workload is beyond the model's context.
            InvalidMask: A mask's components are not the model's.
            SearchExhausted: The evaluation budget does not cover all cases; none was judged.
        """
        started = time.perf_counter()
        for _mask, workload, budget_bytes in cases:
            self.check_budget(workload, budget_bytes)
        needed = [footprint(self.shape, mask, workload) for mask, workload, _budget_bytes in cases]
        self.budget.spend(mask for mask, _workload, _budget_bytes in cases)
        measured = self._ensure_known({mask.digest: mask for mask, _workload, _budget_bytes in cases})
        seconds = time.perf_counter() - started
        return [
            Outcome(self._known[mask.digest], size, int(budget_bytes), mask.digest not in measured, seconds)
            for (mask, _workload, budget_bytes), size in zip(cases, needed, strict=True)
        ]

    def reward(self, outcome: Outcome) -> float:
        """The outcome's terms times this problem's weights.

        Raises:
            InvalidReward: A weight names no term, or a weighted term is not finite.
        """
        return weighted_reward(outcome.reward_terms, self.reward_weights)

    def _ensure_known(self, masks: Mapping[str, PruningMask]) -> set[str]:
        """Makes every mask's evaluation known and returns the digests of those that had to be measured."""
        fresh = {}
        for digest, mask in masks.items():
            if digest in self._known:
                continue
            stored = self.store.get(self.identity(mask)) if self.store else None
            if stored is None:
                fresh[digest] = mask
            else:
                self._known[digest] = Evaluation(**stored)
        if fresh:
            self._measure(list(fresh.values()))
        return set(fresh)

    def _measure(self, masks: list[PruningMask]) -> None:
        with isolated_rng():
            for mask, evaluation in self.evaluator.evaluate_many(self.llm, masks):
                if self.store:  # one by one: whatever is killed, what was finished is kept
                    self.store.put(self.identity(mask), asdict(evaluation))
                self.fresh_evaluations += 1
                self._known[mask.digest] = evaluation

    def identity(self, mask: PruningMask) -> dict:
        """The key of an evaluation: everything that its result depends on."""
        return {
            "kind": "evaluation",
            "model": self.llm.digest,
            "dtype": str(self.llm.dtype),
            "device": self.llm.device.type,
            "dropped": [component.name for component in mask.dropped],
            "evaluator": dict(self.evaluator.identity),
        }
