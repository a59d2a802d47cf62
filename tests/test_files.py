"""Files are there in one piece, or not at all, whatever fails on the way."""

import errno
import os

import pytest

from rap_env.files import write_once, write_over


@pytest.mark.parametrize("write", [write_once, write_over])
def test_text_and_bytes_are_written_and_folders_made(tmp_path, write):
    path = tmp_path / "a" / "b" / "file"
    assert write(path, "Grüße\n") == path and path.read_bytes() == "Grüße\n".encode()
    assert write(tmp_path / "other", b"\0\1").read_bytes() == b"\0\1"
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["file"]


def test_what_is_there_stays_or_is_replaced(tmp_path):
    path = write_once(tmp_path / "file", "first")
    with pytest.raises(FileExistsError):
        write_once(path, "second")
    assert path.read_text() == "first"
    write_over(path, "second")
    assert path.read_text() == "second" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("write", [write_once, write_over])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_that_can_not_sync_takes_files_too(tmp_path, monkeypatch, write, code):
    def unknown(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.fsync", unknown)
    assert write(tmp_path / "file", "text").read_text() == "text" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("write", [write_once, write_over])
@pytest.mark.parametrize("step", ["fsync", "link", "replace"])
def test_nothing_half_written_stays_where_the_disk_is_full(tmp_path, monkeypatch, write, step):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    older = tmp_path / "older"
    older.write_text("older")
    used = {"fsync": (write_once, write_over), "link": (), "replace": (write_over,)}[step]
    monkeypatch.setattr(f"os.{step}" if step != "replace" else "pathlib.Path.replace", full)
    if write not in used:  # a link that can't be made is not missed
        write(tmp_path / "new", "text")
        assert (tmp_path / "new").read_text() == "text"
        return
    for path in (tmp_path / "new", *([older] if write is write_over else [])):
        with pytest.raises(OSError, match="No space left"):
            write(path, "text")
    assert os.listdir(tmp_path) == ["older"] and older.read_text() == "older"
