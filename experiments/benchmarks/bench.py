"""What the benchmark's parts share."""

from functools import cached_property
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.evaluators import Halves
from experiments.recipes.build import build_corpus, build_halves, build_windows, plain
from rap_env.evaluation.evaluator import Evaluator
from rap_env.importance.gsi import greedy_sequential_importance
from rap_env.llm.switchable import SwitchableLLM


class Bench:
    """Builds from the config when it is first needed.

    Args:
        config: The composed config.

    Attributes:
        options: The config as plain values; a part finds its own under its name.
    """

    def __init__(self, config: DictConfig) -> None:
        self._config = config
        self.options: dict[str, Any] = plain(config)

    @cached_property
    def llm(self) -> SwitchableLLM:
        return self.build_llm()

    def build_llm(self, **changes: Any) -> SwitchableLLM:
        """The model again, with changed keys of its YAML."""
        return instantiate(self._config.model, **changes)

    def upstream(self, llm: SwitchableLLM, **changes: Any) -> SwitchableLLM:
        """What upstream's functions run in a model's place: the same, or one built anew in `upstream_dtype`."""
        dtype = self.options["upstream_dtype"]
        return llm if dtype is None else self.build_llm(**changes, dtype=dtype)

    @cached_property
    def _halves(self) -> Halves:
        return build_halves(self._config.evaluation, self.llm)

    @property
    def evaluator(self) -> Evaluator:
        return self._halves.search

    def windows(self, seed: int = 0) -> torch.Tensor:
        """Calibration tokens [N, T]."""
        corpus = build_corpus(self._config, lambda: self._halves.search_text)
        return build_windows(self._config, corpus, self.llm, seed)

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Importance order whose first 20 components are ranked."""
        return greedy_sequential_importance(self.llm, self.windows(), removals=20).order
