"""How far a masked model's predictions are from the dense model's, over windows of text."""

import torch
from torch.nn import functional

from rap_env.evaluation.perplexity import TextEvaluator, logit_tile
from rap_env.llm.lanes import cut, in_lanes, n_lanes
from rap_env.llm.switchable import SwitchableLLM


def token_divergences(llm: SwitchableLLM, dense: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergences [B, T - 1] from the dense predictions of every token of each window but the first.

    Args:
        llm: The model whose head is used.
        dense: The dense model's residual stream behind the last site [B, T, H].
        hidden: The masked model's [B, T, H].
    """
    rows, masked_rows = (stream[:, :-1].reshape(-1, stream.shape[-1]) for stream in (dense, hidden))
    parts = cut([1] * len(rows), n_lanes(len(rows), hidden.device))
    logit_rows, tile_words = logit_tile(llm)
    tile_rows = max(1, logit_rows // 2 // len(parts))  # of each model

    def in_tiles(part: slice) -> torch.Tensor:
        pairs = zip(rows[part].split(tile_rows), masked_rows[part].split(tile_rows), strict=True)
        return torch.cat([_divergences(llm, *pair, tile_words) for pair in pairs])

    return torch.cat(in_lanes(in_tiles, parts)).view(len(hidden), -1)


def _divergences(llm: SwitchableLLM, rows: torch.Tensor, masked_rows: torch.Tensor, tile_words: int) -> torch.Tensor:
    """Divergences [N] between the predictions from two states each [N, H], tile by tile of the vocabulary.

    By the chain rule of relative entropy: the divergence between the tiles' masses, and the mean under the first
    model's masses of the divergences inside the tiles.
    """
    normed, masses, inside = [llm.final_norm(states) for states in (rows, masked_rows)], ([], []), []
    for first in range(0, llm.shape.vocab_size, tile_words):
        words, logs = slice(first, min(first + tile_words, llm.shape.vocab_size)), []
        for states, of_tiles in zip(normed, masses, strict=True):
            tile = llm.head(states, words, out=states.new_empty(len(states), words.stop - words.start)).float()
            logs.append(tile.log_softmax(-1))
            of_tiles.append(tile[:, 0] - logs[-1][:, 0])
        dense_log, masked_log = logs
        inside.append(functional.kl_div(masked_log, dense_log, reduction="none", log_target=True).sum(-1))
    dense_log, masked_log = (torch.stack(of_tiles, -1).log_softmax(-1) for of_tiles in masses)
    return (dense_log.exp() * (dense_log - masked_log + torch.stack(inside, -1))).sum(-1).double()


class DivergenceEvaluator(TextEvaluator):
    """Divergence from the dense model over fixed windows, at the positions that a perplexity is measured at.

    A loss asks at each position for the one token that the text has, a divergence for the dense model's whole
    distribution: the same few tokens tell masks apart with less noise. It is EvoPress's fitness (arXiv 2410.14649). The
    dense model runs once, and its residual stream is kept.
    """

    kind = "divergence"

    def __init__(self, windows: torch.Tensor, name: str, target_tokens: int | None = None) -> None:
        super().__init__(windows, name, target_tokens)
        self.setup_tokens = windows.numel()
        self._dense: tuple[SwitchableLLM, dict[int, torch.Tensor]] | None = None  # of each batch's first window

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_dense": None}  # of this process's model

    def measure(self, llm: SwitchableLLM, hidden: torch.Tensor, batch: slice) -> torch.Tensor:
        if self._dense is None or self._dense[0] is not llm:
            self._dense = llm, {}
        dense = self._dense[1]
        if batch.start not in dense:
            stream = llm.run(llm.shape.sites, *self.open_streams(llm, batch))
            dense[batch.start] = stream[:, self.scored].clone()
        return token_divergences(llm, dense[batch.start], hidden)

    def metrics(self, mean: float) -> dict[str, float]:
        return {"divergence": mean}
