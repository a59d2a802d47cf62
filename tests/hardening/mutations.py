"""Damaged and hostile forms of a file's content, each from a seed."""

import contextlib
import gzip
import io
import json
import pickle
import random
import sqlite3
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Mutation = Callable[[bytes, random.Random, Path], bytes]


class Bomb(str):
    """Creates the file that it names when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path(self),)


def hostile_values(rng: random.Random, trap: Path) -> Any:
    """A value that nobody expects where it will stand."""
    deep: Any = 0
    for _ in range(rng.choice([3, 200])):
        deep = [deep]
    values = (None, True, 0, -1, 2**31, 2**63, 10**30, 1e308, -1e308, float("nan"), float("inf"), 0.5, "", "x", "5")
    values += ("../../etc/passwd", "/etc/passwd", "..", "\x00", "é" * 50, "a" * 5000, [], {}, [[]], {"": 0}, deep)
    values += ([None], ["a", 1], {"_target_": "pathlib.Path.touch", "_args_": [str(trap)]}, str(trap), "${oc.env:HOME}")
    return rng.choice(values)


def mutations_of(name: str) -> dict[str, Mutation]:
    """What can be done to a file of this name."""
    of_form = next((each for ending, each in _BY_ENDING.items() if name.endswith(ending)), {})
    return _BYTES | of_form


def _truncated(content: bytes, rng: random.Random, trap: Path) -> bytes:
    return content[: rng.randrange(len(content) or 1)]


def _flipped(content: bytes, rng: random.Random, trap: Path) -> bytes:
    damaged = bytearray(content or b"\0")
    for _ in range(rng.choice([1, 1, 8, 64])):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _overwritten(content: bytes, rng: random.Random, trap: Path) -> bytes:
    place, size = rng.randrange(len(content) or 1), rng.choice([1, 4, 8, 512])
    return content[:place] + rng.choice([b"\0", b"\xff", b"9"]) * size + content[place + size :]


def _inserted(content: bytes, rng: random.Random, trap: Path) -> bytes:
    place = rng.randrange(len(content) or 1)
    return content[:place] + rng.randbytes(rng.choice([1, 8, 300])) + content[place:]


def _random(content: bytes, rng: random.Random, trap: Path) -> bytes:
    return rng.randbytes(rng.choice([0, 1, 16, 5000]))


def _pickled(content: bytes, rng: random.Random, trap: Path) -> bytes:
    return pickle.dumps(Bomb(trap))


def _nested(content: bytes, rng: random.Random, trap: Path) -> bytes:
    return rng.choice([b"[", b'{"a":', b"- "]) * rng.choice([1000, 100_000])


def _changed_value(value: Any, rng: random.Random, trap: Path) -> Any:
    """A JSON value with one node replaced, removed, doubled, or under another name."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return hostile_values(rng, trap)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        change = rng.random()
        if change < 0.1:
            return {name: each for name, each in value.items() if name != key}
        if change < 0.2:
            return {f"{name}x" if name == key else name: each for name, each in value.items()}
        return value | {key: _changed_value(value[key], rng, trap)}
    place = rng.randrange(len(value))
    change = rng.random()
    if change < 0.2:
        return value[:place] + value[place + 1 :]
    if change < 0.3:
        return value[: place + 1] + value[place:]
    return [*value[:place], _changed_value(value[place], rng, trap), *value[place + 1 :]]


def _json(content: bytes, rng: random.Random, trap: Path) -> bytes:
    return json.dumps(_changed_value(json.loads(content), rng, trap)).encode()


def _json_number(content: bytes, rng: random.Random, trap: Path) -> bytes:
    """Numbers that Python's JSON can't write: too many digits, or none."""
    marked = _json(content, rng, trap).decode()
    for plain in ("null", "0.5", "true", "1e+308"):
        marked = marked.replace(plain, rng.choice(["1e999", "9" * 5000, "-", "0x1"]), 1)
    return marked.encode()


def _json_line(content: bytes, rng: random.Random, trap: Path) -> bytes:
    lines = content.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    lines[place] = _json(lines[place], rng, trap) + b"\n"
    return b"".join(lines)


def _packed(mutation: Mutation) -> Mutation:
    return lambda content, rng, trap: gzip.compress(mutation(gzip.decompress(content), rng, trap))


def _header(content: bytes, rng: random.Random, trap: Path) -> bytes:
    """Another header of a safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.dumps(_changed_value(json.loads(content[8 : 8 + size]), rng, trap)).encode()
    size = rng.choice([len(header), len(header), len(header), 0, 2**40, 2**63])
    return struct.pack("<Q", size) + header + content[8 + struct.unpack("<Q", content[:8])[0] :]


def _odd_array(content: bytes, rng: random.Random, trap: Path) -> bytes:
    """One array of an .npz file missing, pickled, of other type, size or values, or larger than any memory."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file}
    name = rng.choice(list(arrays))
    old, out = arrays.pop(name), io.BytesIO()
    others: list[Any] = [None, np.array([Bomb(trap)], dtype=object), old.astype("U"), old[..., None], old.ravel()[:1]]
    others += [np.zeros(0), np.full(old.shape, np.nan), np.full(old.shape, -1), np.array("{"), np.ones((2, 2, 2, 2))]
    if (new := rng.choice(others)) is not None:
        arrays[name] = new
    np.savez(out, **arrays)
    if rng.random() < 0.3:
        header = {"descr": "<f8", "fortran_order": False, "shape": (10 ** rng.choice([3, 9, 15]),)}
        huge = io.BytesIO()
        np.lib.format.write_array_header_1_0(huge, header)
        with zipfile.ZipFile(out, "a") as archive:
            archive.writestr(f"{name if new is None else 'more'}.npy", huge.getvalue())
    return out.getvalue()


def _odd_field(content: bytes, rng: random.Random, trap: Path) -> bytes:
    """One field of a text with commas, colons or spaces replaced."""
    text = content.decode()
    separator = rng.choice([",", ":", " ", "\n"])
    fields = text.split(separator)
    fields[rng.randrange(len(fields))] = str(hostile_values(rng, trap))
    return separator.join(fields).encode("utf-8", "surrogatepass")


def _yaml_tag(content: bytes, rng: random.Random, trap: Path) -> bytes:
    tags = (
        f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{trap}']]",
        f"!!python/object/apply:os.system ['touch {trap}']",
        f"!!python/object/new:os.system ['touch {trap}']",
        "!!python/name:os.system",
        "!unknown 5",
        "&a [*a, *a]",
    )
    lines = content.decode().splitlines()
    place = rng.randrange(len(lines))
    lines[place] = f"{lines[place].partition(':')[0]}: {rng.choice(tags)}"
    return "\n".join(lines).encode()


def _trapped_code(content: bytes, rng: random.Random, trap: Path) -> bytes:
    return f"import pathlib\npathlib.Path({str(trap)!r}).touch()\n".encode() + content


def _row(content: bytes, rng: random.Random, trap: Path) -> bytes:
    """Another value in a row of a database."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.db"
        path.write_bytes(content)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            table, column = rng.choice(
                [("evaluations", "result"), ("evaluations", "identity"), ("claims", "owner"), ("claims", "renewed_at")]
            )
            value = json.dumps(hostile_values(rng, trap)) if rng.random() < 0.8 else rng.randbytes(9)
            connection.execute(f"UPDATE {table} SET {column} = ?", [value])
            connection.commit()
            connection.execute("PRAGMA journal_mode=DELETE")
            connection.execute("PRAGMA journal_mode=WAL")
        return path.read_bytes()


_BYTES: dict[str, Mutation] = {
    "truncated": _truncated,
    "flipped": _flipped,
    "overwritten": _overwritten,
    "inserted": _inserted,
    "random": _random,
    "pickled": _pickled,
    "nested": _nested,
}
_JSON = {"json": _json, "json again": _json, "json number": _json_number}
_LINES = {"json line": _json_line, "line again": _json_line}
_BY_ENDING: dict[str, dict[str, Mutation]] = {
    ".json": _JSON,
    ".jsonl": _LINES,
    ".jsonl.gz": {name: _packed(each) for name, each in (_LINES | _BYTES).items()},
    ".npz": {"array": _odd_array, "array again": _odd_array},
    ".safetensors": {"header": _header, "header again": _header},
    ".csv": {"field": _odd_field, "field again": _odd_field},
    ".txt": {"field": _odd_field},
    ".yaml": {"field": _odd_field, "tag": _yaml_tag},
    ".db": {"row": _row, "row again": _row, "row once more": _row},
    ".py": {"code": _trapped_code},
}
