"""What comes from outside is read within limits; whatever is wrong with it becomes one error that names the file."""

import contextlib
import gzip
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rap_env.errors import RapError

MOST_UNPACKED_BYTES = 2**30  # of a compressed file: a small one may say that it holds terabytes
_REASON = 400  # characters


@contextlib.contextmanager
def reading(path: object, what: str, error_of: Callable[[str], RapError]) -> Iterator[None]:
    """Turns whatever goes wrong inside into one error.

    Parsers have no list of what they raise on damaged input: deep nesting ends in a RecursionError, a huge number in a
    MemoryError or OverflowError, swapped types in anything. So everything counts as a finding about the file; the
    cause stays chained. Errors that name the file already pass.

    Args:
        path: Of the file or folder.
        what: What was expected in it, such as "a policy of this version".
        error_of: The class of the error.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RapError) and str(path) in str(error):
            raise
        reason = " ".join((str(error) or type(error).__name__).split())
        reason = reason if len(reason) <= _REASON else f"{reason[: _REASON - 3]}..."
        raise error_of(f"{path}: not {what}: {reason}") from error


def read_json(path: Path, what: str, error_of: Callable[[str], RapError]) -> Any:
    """The JSON of a file in UTF-8; raises as `reading` does."""
    with reading(path, what, error_of):
        return json.loads(path.read_text(encoding="utf-8"))


def unpacked_gzip(content: bytes) -> bytes:
    """What a gzip file holds.

    Raises:
        ValueError: More than `MOST_UNPACKED_BYTES`.
        OSError, EOFError, zlib.error: It is damaged.
    """
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        unpacked = file.read(MOST_UNPACKED_BYTES + 1)
    if len(unpacked) > MOST_UNPACKED_BYTES:
        raise ValueError(f"expected at most {MOST_UNPACKED_BYTES:,} bytes when unpacked; there are more")
    return unpacked


def unpacked_arrays(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; nothing in it is unpickled.

    Raises:
        ValueError: More than `MOST_UNPACKED_BYTES`, by what the file or one of its arrays says.
        Exception: What numpy and zipfile raise on a damaged file.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        n_bytes = sum(entry.file_size for entry in archive.infolist())
        n_bytes = max(n_bytes, sum(_array_bytes(archive, entry) for entry in archive.infolist()))
    if n_bytes > MOST_UNPACKED_BYTES:
        raise ValueError(f"expected arrays of at most {MOST_UNPACKED_BYTES:,} bytes; it says {n_bytes:,}")
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return {name: file[name] for name in file}


def _array_bytes(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """What numpy would set aside for an array: it believes the header."""
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _in_columns, dtype = read(file)
    n_values = 1
    for size in shape:
        n_values *= size
    return n_values * dtype.itemsize
