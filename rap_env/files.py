"""Files that are there in one piece, or not at all."""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

_WITHOUT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # some file systems in user space know no such call


def write_once(path: Path, content: str | bytes) -> Path:
    """Creates a file, which is returned; missing folders are made.

    Raises:
        FileExistsError: There is one already; it is left as it is.
        OSError: The file can't be written; nothing of it stays.
    """
    with _draft(path, _one(content)) as draft:
        try:
            os.link(draft, path)  # unlike a rename, a link never replaces what another process has just written
        except FileExistsError:
            raise
        except OSError:  # a file system without links (exFAT, some network shares): not in one piece, but exclusive
            with path.open("xb") as file:
                file.write(draft.read_bytes())
    return path


def write_over(path: Path, content: str | bytes) -> Path:
    """Creates a file, which is returned, or takes an older one's place; missing folders are made.

    Raises:
        OSError: The file can't be written; the older one stays as it is.
    """
    return write_pieces(path, _one(content))


def write_pieces(path: Path, pieces: Iterable[bytes]) -> Path:
    """The same for a file that is not to be in memory as a whole; nothing of it stays if a piece can't be made."""
    with _draft(path, pieces) as draft:
        draft.replace(path)
    return path


def _one(content: str | bytes) -> list[bytes]:
    return [content.encode() if isinstance(content, str) else content]


@contextlib.contextmanager
def _draft(path: Path, pieces: Iterable[bytes]) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in _WITHOUT_SYNC:
                    raise
        yield draft
    finally:
        draft.unlink(missing_ok=True)
