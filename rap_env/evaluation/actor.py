"""What runs in a worker: a model of its own, and the evaluators that were sent to it."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rap_env.evaluation.evaluator import Evaluation, Evaluator
from rap_env.evaluation.identity import engine_identity
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.rng import isolated_rng


def model_identity(llm: SwitchableLLM) -> dict[str, Any]:
    """What has to be equal in two processes so that their results are: a flat mapping."""
    identity = engine_identity(llm)
    names = "\n".join(component.name for component in llm.shape.components)
    return {
        **{key: value for key, value in identity.items() if not isinstance(value, Mapping)},
        **identity["platform"],
        **identity["versions"],
        "components": hashlib.sha256(names.encode()).hexdigest(),
    }


class EvaluationActor:
    """The process of one worker.

    Args:
        threads: Of torch, before anything is loaded.
    """

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._llm: SwitchableLLM | None = None
        self._evaluators: dict[str, Evaluator] = {}

    def load(self, load: Callable[[], SwitchableLLM]) -> Mapping[str, Any]:
        """Loads the model and says what it is."""
        self._llm = load()
        return model_identity(self._llm)

    def evaluate(
        self, reference: list[Any], keeps: Sequence[tuple[bool, ...]], near: tuple[bool, ...] | None
    ) -> list[Evaluation]:
        """Evaluates masks together.

        Args:
            reference: Ray's to the evaluator, in a list so that Ray does not fetch it for each call.
            keeps: Keep-bits of the masks.
            near: Those of the mask that they differ little from, if there is one.

        Returns:
            Evaluations in the order of the masks.
        """
        import ray

        key = reference[0].hex()
        if key not in self._evaluators:
            self._evaluators[key] = ray.get(reference[0])
        components = self._llm.shape.components
        masks = [PruningMask(components, keep) for keep in keeps]
        near_mask = None if near is None else PruningMask(components, near)
        with isolated_rng():
            found = dict(self._evaluators[key].evaluate_many(self._llm, masks, near_mask))
        return [found[mask] for mask in masks]
