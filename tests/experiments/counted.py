"""Packaged text whose evaluators write down what they measure: for tests of processes that share a store."""

import os
from collections.abc import Iterator

from experiments.evaluators import Halves, packaged_text_halves
from rap_env.evaluation.perplexity import PerplexityEvaluator


class CountedEvaluator(PerplexityEvaluator):
    """Appends a line for each mask that is measured to the file that the environment variable MEASURED names."""

    def evaluate_many(self, llm, masks, near=None) -> Iterator:
        for mask, evaluation in super().evaluate_many(llm, masks, near):
            with open(os.environ["MEASURED"], "a") as file:
                file.write(f"{self.name} {mask.digest}\n")
            yield mask, evaluation


def counted_halves(llm, search_windows, report_windows, seed=0, fitness="loss") -> Halves:
    assert fitness == "loss", "only the loss is counted"
    halves = packaged_text_halves(llm, search_windows, report_windows, seed)
    search, report = (CountedEvaluator(half.windows, half.name) for half in (halves.search, halves.report))
    return Halves(search, report, halves.search_text, halves.reported, halves.held_out)
