"""The one way to learn anything about a mask: evaluated once, kept in the store, paid for in forwarded tokens."""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import NamedTuple

from rap_env.errors import SearchExhausted
from rap_env.evaluation.claims import measured_once
from rap_env.evaluation.evaluator import Evaluation, Evaluator, check_finite
from rap_env.evaluation.identity import engine_identity
from rap_env.evaluation.store import ResultStore, identity_digest
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.rng import isolated_rng


class Spending(NamedTuple):
    """One entry of a token budget's history."""

    owner: str  # what asked: an evaluator's identity as a digest
    key: object  # what was asked about, as a rule a mask
    spent_tokens: int  # the entry's own included


class TokenBudget:
    """Counts the tokens that a search asks to have forwarded, whether or not the store knows the answers already.

    So a search on a warm store spends exactly what it would spend on an empty one; and what an engine saves by sharing
    is its gain in seconds, not a discount.

    Args:
        limit: Tokens that may be spent; None for any number.

    Attributes:
        history: What was paid for, in order.
        measured_seconds: Time that it took when it was measured, whoever measured it.

    Raises:
        ValueError: The limit is negative.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 0:
            raise ValueError(f"expected a token budget of at least 0; got {limit}")
        self.limit = limit
        self.history: list[Spending] = []
        self.measured_seconds = 0.0
        self._paid: set[tuple[str, object]] = set()

    @property
    def spent(self) -> int:
        return self.history[-1].spent_tokens if self.history else 0

    @property
    def left(self) -> float:
        """Tokens that may still be spent; infinite without a limit."""
        return math.inf if self.limit is None else self.limit - self.spent

    def has_paid(self, owner: str, key: object) -> bool:
        return (owner, key) in self._paid

    def spend(self, owner: str, keys: Iterable[object], tokens_each: int) -> list[object]:
        """Pays for what was not paid for before, each once, and returns it.

        Raises:
            SearchExhausted: It costs more than is left; nothing was paid.
        """
        new = [key for key in dict.fromkeys(keys) if not self.has_paid(owner, key)]
        if len(new) * tokens_each > self.left:
            raise SearchExhausted(
                f"the token budget is too small: {self.spent:,} of {self.limit:,} tokens are spent;"
                f" {len(new) * tokens_each:,} more were asked for"
            )
        for key in new:
            self._paid.add((owner, key))
            self.history.append(Spending(owner, key, self.spent + tokens_each))
        return new


class Meter:
    """Evaluates the masks of one model with one evaluator.

    Args:
        llm: The model; the mask that is applied to it does not matter, and stays.
        evaluator: Scores masked models.
        store: Keeps finished evaluations for all processes; None keeps them in memory only.
        budget: What pays; by default without limit.

    Attributes:
        known: Evaluations that were asked for so far.
        fresh_evaluations: How many of them were measured here.
    """

    def __init__(
        self,
        llm: SwitchableLLM,
        evaluator: Evaluator,
        store: ResultStore | None = None,
        budget: TokenBudget | None = None,
    ) -> None:
        answering = getattr(llm, "answering", None)  # a table's model, on which nothing can be run
        self.llm, self.store = llm, store
        self.evaluator = answering(evaluator) if answering and evaluator.runs_model else evaluator
        self.budget = TokenBudget() if budget is None else budget
        self.known: dict[PruningMask, Evaluation] = {}
        self.fresh_evaluations = 0

    @functools.cached_property
    def owner(self) -> str:
        """The evaluator, as the budget's history names it."""
        return identity_digest(self.evaluator.identity)

    @functools.cached_property
    def tokens_each(self) -> int:
        """Tokens that evaluating one mask forwards."""
        return self.evaluator.tokens(self.llm)

    def evaluate(self, masks: Sequence[PruningMask], near: PruningMask | None = None) -> list[Evaluation]:
        """Evaluates masks, those that are not known yet together; with exactly the results of one after the other.

        Args:
            masks: Masks over the model's components.
            near: See `Evaluator.evaluate_many`.

        Raises:
            SearchExhausted: The token budget does not cover all of them; none was evaluated.
            InvalidMask: A mask's components are not the model's.
            EvaluationFailed: A score is not a finite number.
            StoreUnavailable, StoreDamaged: The store can't be used.
        """
        self.ensure_known(masks, near)
        return [self.known[mask] for mask in masks]

    def ensure_known(self, masks: Sequence[PruningMask], near: PruningMask | None = None) -> set[PruningMask]:
        """Pays for masks and makes them known, as `evaluate` does; returns those that had to be measured here."""
        for mask in masks:
            self.llm.check(mask)
        if masks and self.evaluator.setup_tokens:
            self.budget.spend(self.owner, ["setup"], self.evaluator.setup_tokens)
        paid = self.budget.spend(self.owner, masks, self.tokens_each)
        fresh = self._know([mask for mask in dict.fromkeys(masks) if mask not in self.known], near)
        self.budget.measured_seconds += sum(self.known[mask].seconds for mask in paid)
        return fresh

    def _know(self, unknown: Sequence[PruningMask], near: PruningMask | None) -> set[PruningMask]:
        if not unknown:
            return set()

        def measure(indices: Sequence[int]) -> Iterator[tuple[int, dict]]:
            position = {unknown[index]: index for index in indices}
            with isolated_rng():
                for mask, evaluation in self.evaluator.evaluate_many(self.llm, list(position), near):
                    self._check(evaluation)
                    self.known[mask] = evaluation
                    self.fresh_evaluations += 1
                    yield position[mask], asdict(evaluation)

        results, measured = measured_once(self.store, [self.identity(mask) for mask in unknown], measure)
        for mask, result in zip(unknown, results, strict=True):
            self.known.setdefault(mask, Evaluation(**result))
        return {unknown[index] for index in measured}

    def affordable(self, masks: Sequence[PruningMask]) -> list[PruningMask]:
        """Those of the masks, in their order, that the budget still pays for; what was paid before costs nothing."""
        left, affordable = self.budget.left, []
        if not self.budget.has_paid(self.owner, "setup"):
            left -= self.evaluator.setup_tokens
        for mask in dict.fromkeys(masks):
            price = 0 if self.budget.has_paid(self.owner, mask) else self.tokens_each
            if price <= left:
                affordable.append(mask)
                left -= price
        return affordable

    def identity(self, mask: PruningMask) -> dict:
        """The key of an evaluation: everything that its result depends on."""
        return engine_identity(self.llm) | {
            "kind": "evaluation",
            "evaluator": dict(self.evaluator.identity),
            "dropped": [component.name for component in mask.dropped],
        }

    def _check(self, evaluation: Evaluation) -> None:
        """An accuracy is finite also where all log-likelihoods are NaN, so every metric is looked at."""
        metrics = {f"{task} {name}": value for task, of in evaluation.tasks.items() for name, value in of.items()}
        for name, value in {"score": evaluation.score, **metrics}.items():
            check_finite(f"{name} on {self.evaluator.name}", [value], self.llm)
