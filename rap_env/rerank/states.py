"""Hidden states of a request's tokens between two sites: in memory, or in a file of which parts are read (GRATING)."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from rap_env.errors import RankingFailed


class States:
    """N rows of H channels in memory, zeros at first. Threads may read and write at the same time.

    Args:
        n_rows: N.
        like: Rows of the same width, type and device [n, H].
    """

    def __init__(self, n_rows: int, like: torch.Tensor) -> None:
        self._rows = like.new_zeros(n_rows, like.shape[1])

    def read(self, rows: slice) -> torch.Tensor:
        """Some rows [n, H]; they may be a view, good until something is written."""
        return self._rows[rows]

    def write(self, start: int, values: torch.Tensor) -> None:
        """Puts rows [n, H] in the place of those from `start` on."""
        self._rows[start : start + len(values)].copy_(values)

    def pick(self, rows: Sequence[int]) -> torch.Tensor:
        """Single rows [n, H]."""
        return torch.cat([self.read(slice(row, row + 1)) for row in rows])

    def keep(self, runs: Sequence[slice]) -> None:
        """Moves runs of rows, ascending, to the front; what is behind them then is anything."""
        end = 0
        for run in runs:
            if run.start > end:
                self.write(end, self.read(run).clone())
            end += run.stop - run.start

    def close(self) -> None:
        """Forgets them."""
        del self._rows


class StatesInFile(States):
    """The same in a file without a name, which is gone once it is closed, however the process ends.

    What is read and written goes through the system's page cache, which is not the process's memory and which the
    system takes back where it is short of it.

    Args:
        n_rows: N.
        like: As in `States`, on a CPU.
        folder: Where the file is; it is made if it is missing.

    Raises:
        RankingFailed: It can't be made; also where rows can't be written or read later.
    """

    def __init__(self, n_rows: int, like: torch.Tensor, folder: Path) -> None:
        self._folder, self._like, self._row_bytes = folder, like[:0].clone(), like[:1].nbytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - `close` closes it
            self._file.truncate(n_rows * self._row_bytes)
        except OSError as error:
            raise self._failed(error) from error

    def read(self, rows: slice) -> torch.Tensor:
        values = self._like.new_empty(rows.stop - rows.start, self._like.shape[1])
        try:
            n_bytes = os.preadv(self._file.fileno(), [_bytes(values)], rows.start * self._row_bytes)
        except OSError as error:
            raise self._failed(error) from error
        if n_bytes != values.nbytes:
            raise self._failed(f"{n_bytes} of {values.nbytes} bytes were read")
        return values

    def write(self, start: int, values: torch.Tensor) -> None:
        values = values.contiguous()
        try:
            n_bytes = os.pwrite(self._file.fileno(), _bytes(values), start * self._row_bytes)
        except OSError as error:
            raise self._failed(error) from error
        if n_bytes != values.nbytes:
            raise self._failed(f"{n_bytes} of {values.nbytes} bytes were written: is the disk full?")

    def close(self) -> None:
        self._file.close()

    def _failed(self, reason: object) -> RankingFailed:
        return RankingFailed(f"states of documents can't be kept in a file in {self._folder}: {reason}")


def _bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.view(torch.uint8).numpy()).cast("B")
