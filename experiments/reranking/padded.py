"""Rivals over transformers: padded batches of whole prompts, with or without layers that are offloaded to the disk."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from rap_env.rerank.prompts import Prompts
from rap_env.rng import isolated_rng


class PaddedBatches:
    """Scores documents as model cards show it: a few prompts at once, padded in front, logits of the last token only.

    Args:
        model: A causal LM of transformers.
        prompts: The tokens of a request, as the reranker has them.
        batch_size: Prompts that are read at once, in the order of the documents.
    """

    def __init__(self, model: nn.Module, prompts: Prompts, batch_size: int) -> None:
        # As `from_pretrained` returns it: torch copies frozen weights for each prompt of a slice.
        self._model = model.requires_grad_(True)
        self._prompts, self._batch_size = prompts, batch_size

    @torch.inference_mode()
    def scores(self, query: str, documents: Sequence[str]) -> list[float]:
        """logit(yes) - logit(no) of each document."""
        prompt = self._prompts.of(query, documents)
        rows = [[*prompt.prefix, *ending] for ending in prompt.endings]
        found: list[float] = []
        for start in range(0, len(rows), self._batch_size):
            found += self._batch(rows[start : start + self._batch_size])
        return found

    def _batch(self, rows: Sequence[Sequence[int]]) -> list[float]:
        longest = max(map(len, rows))
        padded = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
        visible = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        with isolated_rng():
            output = self._model(padded, attention_mask=visible, use_cache=False, logits_to_keep=1)
        logits = output.logits[:, -1].float()
        return (logits[:, self._prompts.yes] - logits[:, self._prompts.no]).tolist()


def offload(model: nn.Module, folder: Path) -> nn.Module:
    """Moves a model's weights into files; each module reads its own while it runs.

    Args:
        model: On a CPU.
        folder: For the files.
    """
    import accelerate

    folder.mkdir(parents=True, exist_ok=True)
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))
