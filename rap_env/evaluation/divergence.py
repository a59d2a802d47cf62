"""How far a masked model's predictions are from the dense model's, over windows of text."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from rap_env.evaluation.perplexity import TextEvaluator, logit_tile
from rap_env.llm.lanes import cut, in_lanes, n_lanes
from rap_env.llm.switchable import SwitchableLLM


def token_divergences(
    llm: SwitchableLLM, dense: torch.Tensor, streams: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor]:
    """Kullback-Leibler divergences [B, T - 1] from the dense predictions of every token of each window but the first.

    Args:
        llm: The model whose head is used.
        dense: The dense model's residual stream behind the last site [B, T, H].
        streams: Those of masked models, each [B, T, H]; the dense predictions are computed once for all.
    """
    rows, *masked_rows = (stream[:, :-1].reshape(-1, stream.shape[-1]) for stream in (dense, *streams))
    parts = cut([1] * len(rows), n_lanes(len(rows), dense.device))
    logit_rows, tile_words = logit_tile(llm)
    tile_rows = max(1, logit_rows // 2 // len(parts))  # of the dense model, and of a masked one

    def in_tiles(part: slice) -> torch.Tensor:
        tiles = zip(*(states[part].split(tile_rows) for states in (rows, *masked_rows)), strict=True)
        return torch.cat([_divergences(llm, dense_rows, others, tile_words) for dense_rows, *others in tiles], 1)

    return torch.cat(in_lanes(in_tiles, parts), 1).view(len(streams), len(dense), -1).unbind()


def _divergences(
    llm: SwitchableLLM, rows: torch.Tensor, masked_rows: Sequence[torch.Tensor], tile_words: int
) -> torch.Tensor:
    """Divergences [M, N] from the predictions of N states [N, H] to those of M others, tile by tile of the vocabulary.

    By the chain rule of relative entropy: the divergence between the tiles' masses, and the mean under the first
    model's masses of the divergences inside the tiles.
    """
    dense, *masked = [llm.final_norm(states) for states in (rows, *masked_rows)]
    masses, inside = [[] for _ in range(1 + len(masked))], [[] for _ in masked]
    for first in range(0, llm.shape.vocab_size, tile_words):
        words = slice(first, min(first + tile_words, llm.shape.vocab_size))
        dense_log, mass = _log_tile(llm, dense, words)
        masses[0].append(mass)
        for states, own_masses, own_inside in zip(masked, masses[1:], inside, strict=True):
            masked_log, mass = _log_tile(llm, states, words)
            own_masses.append(mass)
            own_inside.append(functional.kl_div(masked_log, dense_log, reduction="none", log_target=True).sum(-1))
    dense_log, *masked_logs = (torch.stack(of_tiles, -1).log_softmax(-1) for of_tiles in masses)
    return torch.stack(
        [
            (dense_log.exp() * (dense_log - masked_log + torch.stack(own_inside, -1))).sum(-1).double()
            for masked_log, own_inside in zip(masked_logs, inside, strict=True)
        ]
    )


def _log_tile(llm: SwitchableLLM, normed: torch.Tensor, words: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [N, words] within a tile of the vocabulary, and the logarithm of the tile's mass [N]."""
    logits = llm.head(normed, words, out=normed.new_empty(len(normed), words.stop - words.start)).float()
    logs = logits.log_softmax(-1)
    return logs, logits[:, 0] - logs[:, 0]


class DivergenceEvaluator(TextEvaluator):
    """Divergence from the dense model over fixed windows, at the positions that a perplexity is measured at.

    A loss asks at each position for the one token that the text has, a divergence for the dense model's whole
    distribution: the same few tokens tell masks apart with less noise. It is EvoPress's fitness (arXiv 2410.14649). The
    dense model runs once, and its residual stream is kept.
    """

    kind = "divergence"
    together = 4

    def __init__(self, windows: torch.Tensor, name: str, target_tokens: int | None = None) -> None:
        super().__init__(windows, name, target_tokens)
        self.setup_tokens = windows.numel()
        self._dense: tuple[SwitchableLLM, dict[int, torch.Tensor]] | None = None  # of each batch's first window

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_dense": None}  # of this process's model

    def measure(self, llm: SwitchableLLM, streams: Sequence[torch.Tensor], batch: slice) -> Sequence[torch.Tensor]:
        if self._dense is None or self._dense[0] is not llm:
            self._dense = llm, {}
        dense = self._dense[1]
        if batch.start not in dense:
            stream = llm.run(llm.shape.sites, *self.open_streams(llm, batch))
            dense[batch.start] = stream[:, self.scored].clone()
        return token_divergences(llm, dense[batch.start], streams)

    def metrics(self, mean: float) -> dict[str, float]:
        return {"divergence": mean}
