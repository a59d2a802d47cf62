"""Weights in a file that is mapped into memory: their pages leave and come back."""

import contextlib
import ctypes
import errno
import json
import mmap
import os
import weakref
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from rap_env.errors import WeightsUnavailable
from rap_env.files import write_pieces
from rap_env.llm.architecture import DecoderLayer
from rap_env.llm.stored import TYPES, Piece, Stored

_PAGE = mmap.PAGESIZE
_LENGTH_BYTES = 8  # in front of a safetensors header
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14
_LIBRARY = ctypes.CDLL(None, use_errno=True)
_CHUNK_BYTES = 2**24


class MappedWeights:
    """A safetensors file with some tensors, each beginning with a page, and a private mapping that they are views of.

    To release a piece gives its whole pages back to the operating system; to read it brings them in again, from the
    page cache or the disk. Neither copies anything nor changes a view.

    Linux maps what lies around a page that is read too, as far as it is in the page cache: 64 KiB, or up to 2 MiB where
    the cache has it in one folio, so that many small pieces would bring in several times their bytes. It stops where
    advice about access differs: what is released is advised as `MADV_RANDOM`, and what is read as `MADV_NORMAL`.

    What of the file is checked: when it is opened all of it, against what is in memory, and it is written anew where it
    differs. Before pages are read: that its size and the time of its last change are those of then; where the time is
    another one, all of it once more, against checksums (CRC-32). So a file that was cut or written to is told, but not
    a disk that returns other bytes than were written.

    Pages in memory are shared with the file: what is written into it is computed with at once, and where it is cut they
    are lost, and the process ends when it touches one. So the file can only be read. To delete or replace it is
    harmless.

    Args:
        folder: For the file.

    Attributes:
        path: Of the file, once there is one.
    """

    by_parts = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take(self, stored: Sequence[Stored], digest: str) -> None:
        """Makes tensors views of the mapping.

        Args:
            stored: The tensors.
            digest: Names the file, together with how the tensors lie in it; it is written unless it is there.

        Raises:
            WeightsUnavailable: The file can't be written or read; nothing of it stays then, and no tensor was changed.
        """
        self._header, self._starts, self._size = _layout(stored)
        self._sums = {one: zlib.crc32(_bytes_of(one)) for one in stored}
        path = self.path = self._folder / f"{digest}.{zlib.crc32(self._header):08x}.safetensors"
        try:
            if not path.exists() or not self._is_open():
                write_pieces(path, self._pieces(stored))
                with contextlib.suppress(OSError):  # some file systems know no such modes
                    path.chmod(0o444)
                if not self._is_open():
                    raise OSError("other bytes are read than were written")
            writable = mmap.PROT_READ | mmap.PROT_WRITE  # as torch wants tensors; nothing writes
            self._map = mmap.mmap(self._file, self._size, flags=mmap.MAP_PRIVATE, prot=writable)
        except OSError as error:
            raise WeightsUnavailable(f"the weights can't be written to {path}, or read there: {error}") from error
        self._bytes = np.frombuffer(self._map, np.uint8)
        for one in stored:
            values = one.parameter
            raw = torch.frombuffer(self._map, dtype=values.dtype, count=values.numel(), offset=self._starts[one])
            values.data = one.as_used(raw.view(one.shape))

    def read(self, pieces: Sequence[Piece]) -> None:
        """Has pieces in memory when it returns.

        Raises:
            WeightsUnavailable: The file is not what was written.
        """
        self._check()
        for one, (start, end) in pieces:
            first, end = (self._starts[one] + start) // _PAGE * _PAGE, self._starts[one] + end
            self._map.madvise(mmap.MADV_NORMAL, first, end - first)
            failed = _populate(self._bytes[first:end])
            if failed == errno.EINVAL:  # an older kernel: touches each page
                self._bytes[first:end:_PAGE].sum()
            elif failed:  # where to touch a page would end the process
                raise WeightsUnavailable(f"the weights in {self.path} can't be read: {os.strerror(failed)}")

    def release(self, pieces: Sequence[Piece]) -> None:
        """Gives back the whole pages of pieces."""
        for piece in pieces:
            first, end = self._pages(piece)
            if first < end:
                self._map.madvise(mmap.MADV_RANDOM, first, end - first)
                self._map.madvise(mmap.MADV_DONTNEED, first, end - first)

    def freed_bytes(self, piece: Piece) -> int:
        """The bytes of a piece that are whole pages; a tensor's last page has nothing else in it."""
        first, end = self._pages(piece)
        return max(0, min(end, self._starts[piece[0]] + piece[1][1]) - first)

    def readable(self, layer: DecoderLayer, cut: Sequence[Stored], copied: Sequence[Stored]) -> DecoderLayer:
        """The layer itself, with all of the tensors in memory that are copied from; raises what `read` raises."""
        self.read([(one, (0, one.n_bytes)) for one in copied])
        return layer

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in a mapping of its own: what the C library's allocator has it may keep after it was freed."""
        layout = torch.empty_like(tensor, device="meta")
        own = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        raw = torch.frombuffer(own, dtype=tensor.dtype, count=tensor.numel())
        return raw.as_strided(layout.shape, layout.stride()).copy_(tensor)

    def _pages(self, piece: Piece) -> tuple[int, int]:
        one, (start, end) = piece
        last = end // _PAGE * _PAGE if end < one.n_bytes else end + -end % _PAGE
        return self._starts[one] + start + -start % _PAGE, self._starts[one] + last

    def _check(self) -> None:
        status = os.fstat(self._file)
        if status.st_size != self._size:
            raise WeightsUnavailable(
                f"expected {self._size:,} bytes of weights in {self.path}; it has {status.st_size:,}"
            )
        if status.st_mtime_ns != self._changed:
            if not self._is_intact(self._file):
                raise WeightsUnavailable(f"the weights in {self.path} are not those that were written")
            self._changed = status.st_mtime_ns

    def _is_open(self) -> bool:
        """Opens the file if it is the one that is meant, as it is looked up just now."""
        file = os.open(self.path, os.O_RDONLY)
        status = os.fstat(file)
        if status.st_size != self._size or not self._is_intact(file):
            os.close(file)
            return False
        self._file, self._changed = file, status.st_mtime_ns
        weakref.finalize(self, os.close, file)
        return True

    def _is_intact(self, file: int) -> bool:
        if os.pread(file, len(self._header), 0) != self._header:
            return False
        return all(_sum_of(file, self._starts[one], one.n_bytes) == expected for one, expected in self._sums.items())

    def _pieces(self, stored: Sequence[Stored]) -> Iterator[bytes]:
        yield self._header
        for one in stored:
            yield _bytes_of(one).tobytes()
            yield bytes(-one.n_bytes % _PAGE)


def _populate(pages: np.ndarray) -> int:
    """Has pages in memory, without Python's lock, which `mmap.madvise` would hold; the number of an error, or 0."""
    address, n_bytes = ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(pages.nbytes)
    return ctypes.get_errno() if _LIBRARY.madvise(address, n_bytes, _POPULATE_READ) else 0


def _bytes_of(one: Stored) -> np.ndarray:
    return one.laid_out.view(-1).view(torch.uint8).numpy()


def _sum_of(file: int, start: int, n_bytes: int) -> int:
    found, end = 0, start + n_bytes
    for first in range(start, end, _CHUNK_BYTES):
        found = zlib.crc32(os.pread(file, min(_CHUNK_BYTES, end - first), first), found)
    return found


def _layout(stored: Sequence[Stored]) -> tuple[bytes, dict[Stored, int], int]:
    """A safetensors header that ends with a page, where each tensor begins in the file, and the file's bytes."""
    entries, starts, offset = {}, {}, 0
    for number, one in enumerate(stored):
        end = offset + one.n_bytes
        name = f"{one.name}.T" if one.by_columns else one.name
        kind = TYPES[one.parameter.dtype]
        entries[name] = {"dtype": kind, "shape": list(one.shape), "data_offsets": [offset, end]}
        starts[one] = offset
        offset = end + -end % _PAGE
        if offset > end:  # the format allows no holes
            filled = {"dtype": "U8", "shape": [offset - end], "data_offsets": [end, offset]}
            entries[f"filled.{number}"] = filled
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _PAGE)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return header, {one: len(header) + start for one, start in starts.items()}, len(header) + offset
