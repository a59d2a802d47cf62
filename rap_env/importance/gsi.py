"""Greedy Sequential Importance: remove the least harmful component, re-measure on the shrunk model, repeat."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from rap_env.evaluation.meter import Meter, TokenBudget
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.evaluation.store import ResultStore
from rap_env.importance.lazy import LazyRounds, split_windows
from rap_env.importance.rounds import ExactRounds
from rap_env.importance.stages import StagedRounds
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.windows import check_windows
from rap_env.mask import PruningMask, full_order
from rap_env.memory.footprint import bytes_by_name
from rap_env.memory.workload import Workload

CALIBRATION = "calibration"  # what evaluators on calibration windows are called


@dataclass(frozen=True)
class ImportanceRanking:
    """Components from the least to the most important. Equality ignores what it cost.

    Attributes:
        order: Names of all components; the first `len(losses)` were removed in this order, the others follow by
            what was measured of them last.
        losses: Calibration loss after each removal; of parts that were removed together the loss without all of them.
        dense_loss: Calibration loss of the dense model.
        increases: For each component, by how much the loss of the dense model rises without it. The lazy rule knows
            the least important fifth of them from all windows and others from the sketch; the half of the greatest
            block influence it takes for proportional to that. Empty without any round.
        costs: For each component, what its removal cost when it was measured last; where all sites are whole the same
            as `increases`. It lets components be priced anew for what they free at a workload.
        known: Losses of all masks that were measured on all windows, the dense one among them.
        evaluations: Masks that the rule asked about, wholly or on the sketch only.
        tokens: Tokens that it paid for.
        seconds: Time that this took when it was measured.
    """

    order: tuple[str, ...]
    losses: tuple[float, ...]
    dense_loss: float
    increases: Mapping[str, float]
    costs: Mapping[str, float]
    known: Mapping[PruningMask, float] = field(compare=False)
    evaluations: int
    tokens: int = field(compare=False)
    seconds: float = field(compare=False)


def greedy_sequential_importance(  # noqa: PLR0913 - the public face, everything but the first two by name
    llm: SwitchableLLM,
    windows: torch.Tensor,
    removals: int | None = None,
    exact: bool = False,
    store: ResultStore | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    workload: Workload | None = None,
    budget: TokenBudget | None = None,
) -> ImportanceRanking:
    """Ranks components by greedy removal (RAP, arXiv 2505.17138; the same order as BlockPruner, arXiv 2406.10594).

    Each round removes the component whose absence gives the lowest loss. The exact rule tries every kept component in
    every round: n (n + 1) / 2 evaluations for a full ranking of n. The lazy rule tries only what looks least important;
    see `rap_env.importance.lazy`. Where sites have parts, these go in stages, by loss increase for each byte of
    weights; see `rap_env.importance.stages`.

    Args:
        llm: The model.
        windows: Calibration tokens [N, T].
        removals: Rounds; None removes everything. Components that are left are ranked by what was measured last.
        exact: Whether every round tries every kept component on all windows; otherwise the lazy rule.
        store: Keeps finished evaluations; the same call goes on after a kill, and other calls reuse them.
        progress: Called with (rounds done, rounds in all).
        workload: Ranks by loss increase for each byte that the removal frees at this workload; None ranks by loss.
        budget: Tokens that may be spent; None for any number.

    Raises:
        SearchExhausted: The token budget does not cover the ranking.
        EvaluationFailed: A loss is not a finite number.
        InvalidWorkload: There are no windows, no token to predict, or they are longer than the model's context.
    """
    check_windows(*windows.shape, llm.shape.context_tokens)
    budget = TokenBudget() if budget is None else budget
    spent_before, seconds_before = budget.spent, budget.measured_seconds
    whole = not llm.shape.has_parts
    freed = {c.name: 1 if whole else c.weight_bytes for c in llm.shape.components}
    freed = bytes_by_name(llm.shape, workload) if workload else freed
    rule = ExactRounds if exact else LazyRounds if whole else StagedRounds
    parts = split_windows(windows) if rule is LazyRounds else [windows]
    meters = [Meter(llm, PerplexityEvaluator(part, CALIBRATION), store, budget) for part in parts]
    rounds = rule(*meters, freed=freed)
    n_rounds = len(freed) if removals is None else min(removals, len(freed))
    dense_loss, removed = rounds.loss, []
    for index in range(n_rounds):
        removed.append(rounds.remove_least_important())
        progress(index + 1, n_rounds)
    return ImportanceRanking(
        order=full_order(llm.shape.components, [*(removal.name for removal in removed), *rounds.left()]),
        losses=tuple(removal.loss for removal in removed),
        dense_loss=dense_loss,
        increases=rounds.first_increases,
        costs=rounds.all_costs() if removed else {},
        known=rounds.known,
        evaluations=len(rounds.tried),
        tokens=budget.spent - spent_before,
        seconds=budget.measured_seconds - seconds_before,
    )
