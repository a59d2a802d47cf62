"""What environments, searches and reports all stand on: what a mask is worth for a workload and a budget."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rap_env.errors import InvalidReward, check_known
from rap_env.evaluation.evaluator import Evaluation, Evaluator
from rap_env.evaluation.meter import Meter, TokenBudget
from rap_env.evaluation.store import ResultStore
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.memory.footprint import Footprint, check_feasible, footprint
from rap_env.memory.workload import Workload
from rap_env.reward import overshoot_ratio, perplexity_ratio, weighted_reward

PERPLEXITY_RATIO, SMOOTH_ACCURACY = "perplexity_ratio", "smooth_accuracy"
REWARD_TERMS = ("accuracy", SMOOTH_ACCURACY, "overshoot", "violation", PERPLEXITY_RATIO)
ACCURACY_REWARD = {"accuracy": 1.0, "overshoot": -5.0}


@dataclass(frozen=True)
class Outcome:
    """What a mask is worth for one workload and memory budget.

    Attributes:
        evaluation: Quality of the masked model, for the workload's kind of text where the evaluator tells kinds apart.
        footprint: Bytes that it needs for the workload.
        budget_bytes: Bytes that it may need.
        from_store: Whether the evaluation was known already.
        seconds: Time that this call took.
        dense_score: Score of the unpruned model on the same evaluator; None where no reward asks for it.
    """

    evaluation: Evaluation
    footprint: Footprint
    budget_bytes: int
    from_store: bool = field(compare=False)
    seconds: float = field(compare=False)
    dense_score: float | None = field(default=None, compare=False, kw_only=True)

    @property
    def score(self) -> float:
        return self.evaluation.score

    @property
    def fits(self) -> bool:
        return self.footprint.peak_bytes <= self.budget_bytes

    @property
    def reward_terms(self) -> dict[str, float]:
        """`accuracy` (the score), `smooth_accuracy`, `overshoot` (fraction of the budget) and `violation` (0 or 1).

        An evaluation by text has no smooth accuracy. With a dense score there is also `perplexity_ratio`, that of the
        dense model over that of the masked one.
        """
        smooth = self.evaluation.mean("smooth_acc")
        terms = {
            "accuracy": self.score,
            **({} if math.isnan(smooth) else {SMOOTH_ACCURACY: smooth}),
            "overshoot": overshoot_ratio(self.footprint.peak_bytes, self.budget_bytes),
            "violation": float(not self.fits),
        }
        if self.dense_score is not None:
            terms[PERPLEXITY_RATIO] = perplexity_ratio(self.score, self.dense_score)
        return terms


class PruningProblem:
    """A model, an evaluator and a store; environments, searches and reports all ask here.

    A problem is a live object: copies of it are itself.

    Args:
        llm: The model; the mask that is applied to it does not matter, and stays.
        evaluator: Scores masked models.
        store: Keeps finished evaluations; None keeps them in memory only.
        reward_weights: Weights of the terms in `Outcome.reward_terms`.
        budget: Tokens that may be asked for; by default without limit.

    Attributes:
        meter: Evaluates masks, and counts what they cost.

    Raises:
        InvalidReward: A weight names no term.
    """

    def __init__(
        self,
        llm: SwitchableLLM,
        evaluator: Evaluator,
        store: ResultStore | None = None,
        reward_weights: Mapping[str, float] = ACCURACY_REWARD,
        budget: TokenBudget | None = None,
    ) -> None:
        for name in reward_weights:
            if name not in REWARD_TERMS:
                raise InvalidReward(f"no reward term {name!r}; known terms: {', '.join(REWARD_TERMS)}")
        self.meter = Meter(llm, evaluator, store, budget)
        self.reward_weights = dict(reward_weights)
        self._is_relative = PERPLEXITY_RATIO in self.reward_weights
        self.llm, self.shape = llm, llm.shape
        self.evaluator, self.store, self.budget = evaluator, store, self.meter.budget

    def __deepcopy__(self, memo: dict[int, Any]) -> "PruningProblem":
        return self  # Gymnasium copies the arguments of `make`; a model and an open store must not be doubled

    def with_budget(self, budget: TokenBudget | None = None) -> "PruningProblem":
        """The same model, evaluator, store and reward with a token budget of its own; by default without limit."""
        return PruningProblem(self.llm, self.evaluator, self.store, self.reward_weights, budget)

    @property
    def dense_score(self) -> float | None:
        """The unpruned model's score, where rewards are relative to it and it was paid for; see `prepare`."""
        return self._dense_score("")

    def _dense_score(self, kind: str) -> float | None:
        dense = PruningMask.all_kept(self.shape)
        return self.known(dense, kind).score if self._is_relative and dense in self.meter.known else None

    def known(self, mask: PruningMask, kind: str = "") -> Evaluation:
        """What is known of an evaluated mask, for a kind of text if the evaluator tells kinds apart."""
        evaluation = self.meter.known[mask]
        return evaluation.of(kind) if kind and self.evaluator.kinds else evaluation

    def prepare(self) -> None:
        """Evaluates the unpruned model, where a reward weight asks for its score.

        Raises:
            SearchExhausted: The token budget does not cover it.
        """
        if self._is_relative:
            self.meter.ensure_known([PruningMask.all_kept(self.shape)])

    def evaluate(self, mask: PruningMask, workload: Workload, budget_bytes: int) -> Outcome:
        """Evaluates a mask for a workload and a memory budget; raises what `evaluate_many` raises."""
        return self.evaluate_many([(mask, workload, budget_bytes)])[0]

    def evaluate_many(self, cases: Sequence[tuple[PruningMask, Workload, int]]) -> list[Outcome]:
        """Evaluates masks for workloads and memory budgets; those that are not known yet are evaluated together.

        The outcomes are exactly those of evaluating one after the other.

        Raises:
            InfeasibleBudget: No mask can meet a budget.
            InvalidWorkload: A workload is beyond the model's context.
            InvalidMask: A mask's components are not the model's.
            UnknownName: A workload is of a kind of text that the evaluator, which tells kinds apart, does not have.
            SearchExhausted: The token budget does not cover all cases; none was evaluated.
            EvaluationFailed: A score is not a finite number.
        """
        started = time.perf_counter()
        for _mask, workload, budget_bytes in cases:
            check_feasible(self.shape, workload, budget_bytes)
            if workload.kind and self.evaluator.kinds:
                check_known("kind of text", workload.kind, self.evaluator.kinds)
        self.prepare()
        needed = [footprint(self.shape, mask, workload) for mask, workload, _budget_bytes in cases]
        fresh = self.meter.ensure_known([mask for mask, _workload, _budget_bytes in cases])
        seconds = time.perf_counter() - started
        return [
            Outcome(
                self.known(mask, workload.kind),
                size,
                int(budget_bytes),
                mask not in fresh,
                seconds,
                dense_score=self._dense_score(workload.kind),
            )
            for (mask, workload, budget_bytes), size in zip(cases, needed, strict=True)
        ]

    def reward(self, outcome: Outcome) -> float:
        """The outcome's terms times this problem's weights.

        Raises:
            InvalidReward: A weight names no term, or a weighted term is not finite.
        """
        return weighted_reward(outcome.reward_terms, self.reward_weights)

    def reward_within_budget(self, evaluation: Evaluation) -> float:
        """The reward of an evaluated mask in any context that it fits; raises what `reward` raises."""
        return self.reward(Outcome(evaluation, Footprint(0, 0, 0), 1, True, 0.0, dense_score=self.dense_score))
