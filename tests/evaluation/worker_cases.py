"""What the tests of workers share: evaluators that end the process that runs them, and models that do not load."""

import os
import time
from pathlib import Path

import torch

from rap_env.errors import ModelUnavailable
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.llm.loading import build_tiny_llm

DEADLY = "layer0.mlp"  # the mask that drops this one alone
WINDOWS = torch.randint(0, 256, (4, 40), generator=torch.Generator().manual_seed(0))


class DeadlyEvaluator(PerplexityEvaluator):
    """Ends its process at one mask as often as it is told, and writes a line for each mask and process.

    Args:
        folder: Where it writes `measured`, and finds as many files `life*` as processes shall end.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(WINDOWS, "deadly")
        self._folder = folder

    def evaluate_many(self, llm, masks, near=None):
        for mask in masks:
            if [component.name for component in mask.dropped] == [DEADLY]:
                for life in self._folder.glob("life*"):
                    life.unlink()
                    os._exit(1)
        for mask, evaluation in super().evaluate_many(llm, masks, near):
            with open(self._folder / "measured", "a") as file:
                file.write(f"{os.getpid()} {mask.digest}\n")
            time.sleep(0.01)
            yield mask, evaluation


class FailingEvaluator(PerplexityEvaluator):
    """Raises what our evaluators raise."""

    def __init__(self) -> None:
        super().__init__(WINDOWS, "failing")

    def evaluate_many(self, llm, masks, near=None):
        raise ModelUnavailable("the weights are gone")


def load_other_tiny():
    return build_tiny_llm(seed=1)


def refuse_to_load():
    raise ModelUnavailable("no such folder")


def die_while_loading():
    os._exit(1)
