"""Evaluators for kinds of context, by names such as `prose 1024` or `recall 256`: a search half and a report half."""

from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.evaluators import without_overlaps
from rap_env.calibration import kinds, random_windows
from rap_env.errors import check_known
from rap_env.evaluation.divergence import DivergenceEvaluator
from rap_env.evaluation.evaluator import Evaluator
from rap_env.evaluation.harness import HarnessEvaluator
from rap_env.evaluation.perplexity import PerplexityEvaluator, cut_contexts
from rap_env.llm.switchable import SwitchableLLM

RECALL = "recall"
_LONGEST = {"prose": 1024, "code": 256, "dialogue": 256, "questions": 256}  # contexts of each kind of text, in tokens


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        search_windows: Of each draw of text.
        report_windows: Of text.
        target_tokens: Scored tokens of each window.
        search_items: Of each draw of recall.
        report_items: Of recall at each length.
    """

    search_windows: int = 2
    report_windows: int = 6
    target_tokens: int = 128
    search_items: int = 10
    report_items: int = 24


class Texts:
    """The evaluators.

    Args:
        llm: Its tokenizer cuts the text.
        shared: Folder with `text/` (WikiText-2) and `lm_eval_tasks/` (PIQA, BoolQ).
        sizes: How much is drawn.
    """

    def __init__(self, llm: SwitchableLLM, shared: Path, sizes: Sizes) -> None:
        self._llm, self._sizes = llm, sizes
        self._drawn: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        text, tasks = shared / "text", shared / "lm_eval_tasks"
        self._corpora = {
            "prose": lambda: kinds.prose(str(text / "wikitext2_valid.txt"), str(text / "wikitext2_test.txt")),
            "code": kinds.code,
            "dialogue": lambda: kinds.dialogue(tasks / "piqa.jsonl"),
            "questions": lambda: kinds.questions(tasks / "boolq.jsonl"),
        }

    def search(self, name: str, draw: int) -> Evaluator:
        """Divergence from the dense model on a draw of text, or smooth accuracy on items of recall; draws are disjoint.

        Divergence tells masks apart by fewer tokens than the loss does.

        Args:
            name: A kind of context, such as `prose 1024`.
            draw: 0 or 1.
        """
        kind, context_tokens = self._parsed(name)
        if kind == RECALL:
            task, half = f"rap_recall_{context_tokens}_search", ("search", "report")[draw]  # even items, odd items
            return HarnessEvaluator(task, half=half, limit=self._sizes.search_items, metric="smooth_acc")
        windows = self._windows(kind)[0][draw::2]
        cut = cut_contexts(windows, context_tokens, self._sizes.target_tokens)
        return DivergenceEvaluator(cut, f"{name}, draw {draw}", self._sizes.target_tokens)

    def report(self, name: str) -> list[Evaluator]:
        """The loss on each window of text, for paired errors; or one evaluator of recall."""
        kind, context_tokens = self._parsed(name)
        if kind == RECALL:
            task = f"rap_recall_{context_tokens}_report"
            return [HarnessEvaluator(task, limit=self._sizes.report_items, metric="smooth_acc")]
        cut = cut_contexts(self._windows(kind)[1], context_tokens, self._sizes.target_tokens)
        return [PerplexityEvaluator(window[None], name, self._sizes.target_tokens) for window in cut]

    def _parsed(self, name: str) -> tuple[str, int]:
        kind, _, tokens = name.partition(" ")
        return check_known("kind of context", kind, (RECALL, *self._corpora)), int(tokens)

    def _windows(self, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows to search on, of both draws in turn, and windows to report on."""
        if kind not in self._drawn:
            search, report = self._corpora[kind]()
            tokens, tokenizer = _LONGEST[kind] + self._sizes.target_tokens, self._llm.tokenizer
            reported = random_windows(report, tokenizer, self._sizes.report_windows, tokens, seed=0)
            clean = without_overlaps(search, {report.name: tokenizer.batch_decode(reported)})
            self._drawn[kind] = (
                random_windows(clean, tokenizer, 2 * self._sizes.search_windows, tokens, seed=0),
                reported,
            )
        return self._drawn[kind]
