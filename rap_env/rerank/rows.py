"""An embedding of which only the rows used last are in memory; the others are read from a mapped file (GRATING)."""

import math
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from rap_env.errors import UnsupportedArchitecture
from rap_env.llm.mapped_weights import MappedWeights
from rap_env.llm.stored import TYPES, Stored


class CachedEmbedding(nn.Module):
    """Takes the place of an embedding, [...] -> [..., H], and returns the same bits.

    The rows used last stay in memory. A row that is not there has its pages read from the file, is copied, and the
    pages leave again.

    Args:
        memory: Holds the table.
        table: The table [V, H] in it.
        n_rows: Rows that stay in memory, at least one.

    Attributes:
        weight: The table, a view of the mapped file.
        rows_read: How many rows came from the file so far.
    """

    def __init__(self, memory: MappedWeights, table: Stored, n_rows: int) -> None:
        super().__init__()
        self.weight, self.rows_read = table.parameter, 0
        self._memory, self._table = memory, table
        self._slots: OrderedDict[int, int] = OrderedDict()  # by token, the one used last at the end
        self._kept = torch.empty(n_rows, *table.shape[1:], dtype=table.parameter.dtype)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        tokens, places = input_ids.unique(return_inverse=True)
        return self._rows(tokens.tolist())[places]

    def _rows(self, tokens: list[int]) -> torch.Tensor:
        """Rows of distinct tokens [U, H]. Nothing is forgotten where the file can't be read."""
        here = [place for place, token in enumerate(tokens) if token in self._slots]
        missing = [place for place, token in enumerate(tokens) if token not in self._slots]
        rows = self._kept.new_empty(len(tokens), self._kept.shape[1])
        rows[missing] = self._read([tokens[place] for place in missing])
        rows[here] = self._kept[[self._slots[tokens[place]] for place in here]]
        for place in here:
            self._slots.move_to_end(tokens[place])
        kept = missing[-len(self._kept) :]
        slots = [self._slot_for(tokens[place]) for place in kept]
        self._kept[slots] = rows[kept]
        return rows

    def _slot_for(self, token: int) -> int:
        full = len(self._slots) == len(self._kept)
        slot = self._slots.popitem(last=False)[1] if full else len(self._slots)
        self._slots[token] = slot
        return slot

    def _read(self, tokens: list[int]) -> torch.Tensor:
        row_bytes = self._table.n_bytes // self._table.shape[0]
        pieces = [(self._table, (token * row_bytes, (token + 1) * row_bytes)) for token in tokens]
        try:
            self._memory.read(pieces)
            rows = self.weight.detach()[tokens]
        finally:
            self._memory.release([(self._table, (0, self._table.n_bytes))])
        self.rows_read += len(tokens)
        return rows


def cache_rows(llm, share: float, folder: Path) -> CachedEmbedding:
    """Puts a cache in the place of a model's embedding; the head goes into the mapped file, too.

    The head still works, with the pages that it touches in memory from then on. The embedding is as it was for everyone
    who computes with the model.

    Args:
        llm: A `SwitchableLLM` on a CPU.
        share: Of the rows of the embedding that stay in memory, above 0 and at most 1.
        folder: For the file.

    Raises:
        UnsupportedArchitecture: The model is not on a CPU, or its embedding is quantised.
        WeightsUnavailable: The file can't be written; the model is as it was.
    """
    embedding, head = llm.model.get_input_embeddings(), llm.model.get_output_embeddings()
    if llm.device.type != "cpu" or not (isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)):
        raise UnsupportedArchitecture(
            f"expected a model on a CPU with an embedding in {', '.join(map(str, TYPES))} that is not quantised;"
            f" {llm.name} is on {llm.device}, with a {type(embedding).__name__}"
        )
    tables = [_stored("embedding", embedding.weight)]
    if head.weight is not embedding.weight:
        tables.append(_stored("head", head.weight))
    memory = MappedWeights(folder)
    memory.take(tables, llm.digest)
    memory.release([(table, (0, table.n_bytes)) for table in tables])
    cached = CachedEmbedding(memory, tables[0], max(1, math.ceil(share * len(embedding.weight))))
    llm.model.set_input_embeddings(cached)
    return cached


def _stored(name: str, weight: nn.Parameter) -> Stored:
    spans = ((0, weight.nbytes),)
    return Stored(name, "", weight, False, spans, (weight.nbytes,), False, tuple(weight.shape), weight.nbytes)
