"""A long text for the price of a short one: each mask is read on a part of its own, relative to the dense model."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rap_env.errors import InvalidConfig
from rap_env.evaluation.evaluator import Evaluation, Evaluator
from rap_env.evaluation.perplexity import TextEvaluator, tokens_digest
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask


class RotatingEvaluator(Evaluator):
    """Evaluates each mask on one of several parts of a text; which one follows from the mask.

    A search that compares hundreds of masks on a thousand tokens ends with masks that suit these tokens. Here no mask
    can suit more than its own part, and whoever learns from all masks learns from the whole text. That costs noise:
    parts differ. So a score is the dense model's on the whole text plus what the mask differs from the dense model on
    its part, which is most of the noise gone.

    Args:
        evaluator: On the whole text.
        parts: How many; each has as many windows.

    Raises:
        InvalidConfig: The windows can't be cut into so many equal parts.
    """

    def __init__(self, evaluator: TextEvaluator, parts: int) -> None:
        windows = evaluator.windows
        if parts < 1 or len(windows) % parts:
            raise InvalidConfig(f"expected windows that can be cut into equal parts; got {len(windows)} and {parts}")
        self.name, self._windows, self._kind = evaluator.name, windows, evaluator.kind
        self._target_tokens = evaluator.target_tokens
        self._parts = [type(evaluator)(own, self.name, evaluator.target_tokens) for own in windows.chunk(parts)]
        self.setup_tokens = windows.numel() + sum(part.setup_tokens for part in self._parts)
        self._dense: tuple[SwitchableLLM, list[float]] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        own = {"evaluator": f"rotating {self._kind}", "name": self.name, "windows": tokens_digest(self._windows)}
        return own | {"target_tokens": self._target_tokens, "parts": len(self._parts)}

    def tokens(self, llm: SwitchableLLM) -> int:
        return self._windows.numel() // len(self._parts)

    def evaluate_many(
        self, llm: SwitchableLLM, masks: Sequence[PruningMask], near: PruningMask | None = None
    ) -> Iterator[tuple[PruningMask, Evaluation]]:
        dense = self._dense_scores(llm)
        mean = sum(dense) / len(dense)
        for index, part in enumerate(self._parts):
            own = [mask for mask in masks if self.part_of(mask) == index]
            for mask, evaluation in part.evaluate_many(llm, own):
                yield mask, self._shifted(part, evaluation, mean - dense[index])

    def part_of(self, mask: PruningMask) -> int:
        """Which part a mask is evaluated on."""
        return int(mask.digest[:8], 16) % len(self._parts)

    def _shifted(self, part: TextEvaluator, evaluation: Evaluation, by: float) -> Evaluation:
        score = evaluation.score + by
        return replace(evaluation, score=score, tasks={self.name: part.metrics(-score) | {"items": len(part.windows)}})

    def _dense_scores(self, llm: SwitchableLLM) -> list[float]:
        if self._dense is None or self._dense[0] is not llm:
            mask = PruningMask.all_kept(llm.shape)
            scores = [evaluation.score for part in self._parts for _mask, evaluation in part.evaluate_many(llm, [mask])]
            self._dense = llm, scores
        return self._dense[1]
