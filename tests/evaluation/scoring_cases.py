"""Scores of pairs under the mask that is applied."""

from collections.abc import Sequence

from rap_env.evaluation.scoring import Pair, Score, ScoringPlan
from rap_env.llm.switchable import SwitchableLLM


def score_continuations(llm: SwitchableLLM, pairs: Sequence[Pair], batch_tokens: int = 4096) -> list[Score]:
    if not pairs:
        return []
    return next(ScoringPlan(pairs, batch_tokens).run(llm, [llm.mask]))[1]
