"""The policy that reads the text: an archive for each kind of text, and the nearest kind's serves a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rap_env.llm.architecture import ModelShape
from rap_env.llm.sentences import encode_sentences
from rap_env.mask import PruningMask
from rap_env.memory.workload import Workload
from rap_env.policies.archive import ArchivePolicy
from rap_env.policies.base import policy_kind


@policy_kind
class RetrievalPolicy:
    """EvoP's retrieval at run time (arXiv 2502.14910): a text gets the masks of the cluster that it is nearest to.

    Where no text is at hand, the first archive decides.

    Args:
        shape: The model.
        archives: What decides for each of k clusters of texts.
        centres: Vectors [k, D] of the clusters' centres, as `encode_sentences` makes them of texts.

    Raises:
        ValueError: There is no archive, or there are not as many as centres.
    """

    kind = "retrieval"

    def __init__(self, shape: ModelShape, archives: Sequence[ArchivePolicy], centres: np.ndarray) -> None:
        if not archives or len(archives) != len(centres):
            raise ValueError(
                f"expected a centre for each of 1 or more archives; got {len(centres)} for {len(archives)}"
            )
        self.shape = shape
        self.archives = tuple(archives)
        self._centres = np.asarray(centres, dtype=np.float32)

    def decide(self, workload: Workload, budget_bytes: int) -> PruningMask:
        return self.archives[0].decide(workload, budget_bytes)

    def nearest(self, texts: Sequence[str]) -> np.ndarray:
        """Which archive [N] serves each of N texts: `policy.archives[policy.nearest([prompt])[0]].decide(...)`.

        The encoder reads the first 256 of its tokens of a text.

        Raises:
            ModelUnavailable: The sentence encoder can't be had.
        """
        away = encode_sentences(texts)[:, None] - self._centres
        return (away**2).sum(-1).argmin(-1)

    def parameters(self) -> dict[str, Any]:
        return {"archives": [archive.parameters() for archive in self.archives]}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"centres": torch.from_numpy(self._centres)}

    @classmethod
    def restore(cls, shape: ModelShape, parameters: Mapping, tensors: Mapping[str, torch.Tensor]) -> "RetrievalPolicy":
        archives = [ArchivePolicy.restore(shape, of_one, {}) for of_one in parameters["archives"]]
        return cls(shape, archives, tensors["centres"].numpy())
