"""The result store: every finished evaluation, kept under its full identity, shared by processes, never lost.

Each write is one `INSERT` in autocommit, so a killed writer leaves a whole row or none. The file is SQLite in
write-ahead mode, where readers never wait for writers; it wants a local disk, as SQLite's locks fail on network ones.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from rap_env.errors import RapError, StoreDamaged, StoreUnavailable

LOCK_TIMEOUT_SECONDS = 60.0
SCHEMA_VERSION = 1
APPLICATION_ID = 0x52415053  # "RAPS" in SQLite's header: tells our files from other programs' databases

_METADATA = sa.MetaData()
_EVALUATIONS = sa.Table(
    "evaluations",
    _METADATA,
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("identity", sa.Text, nullable=False),
    sa.Column("result", sa.Text, nullable=False),
    sa.Column("created_at", sa.Text, nullable=False),
)
_FIND = sa.select(_EVALUATIONS.c.identity, _EVALUATIONS.c.result).where(_EVALUATIONS.c.digest == sa.bindparam("digest"))
_COUNT = sa.select(sa.func.count()).select_from(_EVALUATIONS)
_INSERT = {
    "sqlite": sqlite.insert(_EVALUATIONS).on_conflict_do_nothing(index_elements=["digest"]),
    "postgresql": postgresql.insert(_EVALUATIONS).on_conflict_do_nothing(index_elements=["digest"]),
}
# SQLITE_ERROR is "no such table" here, as the statements are fixed.
_SQLITE_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR)
_POSTGRESQL_DAMAGE = ("XX", "42P01", "42703")  # internal error or corruption, no such table, no such column


def _json(kind: str, value: Mapping, **options: object) -> str:
    try:
        return json.dumps(dict(value), allow_nan=False, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected {kind} of finite JSON values; {error}: {value!r}") from error


def _canonical_json(identity: Mapping) -> str:
    return _json("an identity", identity, sort_keys=True, separators=(",", ":"))


def identity_digest(identity: Mapping) -> str:
    """SHA-256 over the canonical JSON of an identity, hexadecimal; the order of the keys doesn't matter.

    Raises:
        ValueError: The identity holds NaN, infinity, or something that JSON can't express.
    """
    return hashlib.sha256(_canonical_json(identity).encode()).hexdigest()


def _exact_json(result: Mapping) -> str:
    text = _json("a result", result)
    # A stored result must equal the fresh one, or a search would depend on who evaluated first.
    if json.loads(text) != dict(result):
        raise ValueError(f"expected lists and string keys, as tuples and other keys change in JSON; got {result!r}")
    return text


class ResultStore:
    """Finished evaluations under their full identity, in SQLite or PostgreSQL; safe among threads and processes.

    A missing file and its folders are created. A file that is there already must be a whole store: an empty one is
    refused like any other damage, because stores appear complete and only a lost store leaves no bytes. The check at
    opening reads the file once. A store may be pickled and may be open across a fork.

    Args:
        location: A path, `sqlite:///path`, or `postgresql+psycopg://user@host/database`.

    Raises:
        ValueError: The location is neither, or names a store in memory.
        StoreDamaged: What is there can't be read, or has another schema; it is left as it was found.
        StoreUnavailable: It can't be opened now: no permission, no server, no driver, locked for too long.
    """

    def __init__(self, location: str | Path | sa.URL) -> None:
        self._location = _path_or_url(location)
        self._name = str(self._location)  # of a URL without its password
        open_engine = _open_sqlite if isinstance(self._location, Path) else _open_postgresql
        with _IN_USE, _explained(self._name):
            self._engine = open_engine(self._location)
            _ENGINES.add(self._engine)
        self._insert = _INSERT[self._engine.dialect.name]

    def get(self, identity: Mapping) -> dict | None:
        """The stored result of exactly this identity, or None.

        Raises:
            ValueError: The identity is not made of finite JSON values.
            StoreDamaged: The store can't be read, or the row found belongs to another identity.
            StoreUnavailable: The store can't be reached now.
        """
        asked = _canonical_json(identity)
        digest = hashlib.sha256(asked.encode()).hexdigest()
        with self._connection() as connection:
            row = connection.execute(_FIND, {"digest": digest}).first()
        if row is None:
            return None
        if row.identity != asked:
            raise _damaged(self._name, f"holds another identity under {digest}: asked {asked}, found {row.identity}")
        try:
            return json.loads(row.result)
        except (TypeError, ValueError) as error:
            raise _damaged(self._name, f"holds no JSON result under {digest}: {error}") from error

    def put(self, identity: Mapping, result: Mapping) -> None:
        """Stores a result; on disk when this returns. The first result of an identity stays, later ones are ignored.

        Raises:
            ValueError: Identity or result hold NaN or infinity, or the result would not come back equal from JSON.
            StoreDamaged: The store can't be read.
            StoreUnavailable: The store can't be written now: locked for too long, full, read-only, unreachable.
        """
        values = {
            "digest": identity_digest(identity),
            "identity": _canonical_json(identity),
            "result": _exact_json(result),
            "created_at": datetime.now(UTC).isoformat(),
        }
        with self._connection() as connection:
            connection.execute(self._insert, values)

    def __len__(self) -> int:
        with self._connection() as connection:
            return connection.execute(_COUNT).scalar_one()

    def __bool__(self) -> bool:
        return True  # without this an empty store is false, and `if store:` would never fill it

    def close(self) -> None:
        """Closes the connections of this process; using the store afterwards opens them again."""
        with _IN_USE:
            self._engine.dispose()

    def __enter__(self) -> "ResultStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple:
        return ResultStore, (self._location,)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sa.Connection]:
        with _IN_USE, _explained(self._name), self._engine.connect() as connection:
            yield connection


# SQLite counts its locks per process and a fork inherits the counts but not the locks: a child that reopened a file
# its parent had open would write into a log that the parent deletes. So no connection may be open during a fork;
# noticing the new process id afterwards is too late.
_IN_USE = threading.RLock()
_ENGINES: "weakref.WeakSet[sa.Engine]" = weakref.WeakSet()


def _close_before_fork() -> None:
    _IN_USE.acquire()  # waits for statements in other threads; released on both sides of the fork
    for engine in list(_ENGINES):
        engine.dispose()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_close_before_fork, after_in_parent=_IN_USE.release, after_in_child=_IN_USE.release)


def _damaged(name: str, finding: str) -> StoreDamaged:
    advice = "restore it from a copy, or move it away (a file with its -wal and -shm files) to begin a new one"
    return StoreDamaged(f"the result store {name} {finding}; it was left unchanged: {advice}")


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns errors of the database and the file system into ours, damage apart from what may pass."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        cause = error.orig
        if isinstance(cause, sqlite3.Error):
            code = getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)  # none: Python couldn't decode the text
            damage = code & 0xFF in _SQLITE_DAMAGE
        else:
            damage = (getattr(cause, "sqlstate", None) or "").startswith(_POSTGRESQL_DAMAGE)
        if damage:
            raise _damaged(name, f"can't be read ({cause})") from error
        raise StoreUnavailable(f"the result store {name} can't be used now: {cause}") from error
    except RapError:
        raise
    except OSError as error:
        raise StoreUnavailable(f"the result store {name} can't be opened or created: {error}") from error


def _path_or_url(location: str | Path | sa.URL) -> Path | sa.URL:
    if isinstance(location, Path) or (isinstance(location, str) and "://" not in location):
        return Path(location).resolve()
    try:
        url = sa.make_url(location)
    except sa.exc.ArgumentError as error:
        raise ValueError(f"expected a path, sqlite:///path or postgresql+psycopg://...; {error}") from error
    if (backend := url.drivername.split("+")[0]) not in _INSERT:
        raise ValueError(f"expected a result store in sqlite or postgresql; got {backend!r}")
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if url.database in (None, "", ":memory:") or url.query:
        raise ValueError(f"expected sqlite:///path, without options and not in memory; got {str(url)!r}")
    return Path(url.database).resolve()


def _sqlite_engine(path: Path, mode: str, **options: object) -> sa.Engine:
    """An engine in autocommit. Mode `rw` and not `rwc` in use: a store that vanished must not come back empty."""
    url = sa.URL.create("sqlite", database=path.as_uri(), query={"mode": mode, "uri": "true"})
    timeout = {"timeout": LOCK_TIMEOUT_SECONDS}
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", connect_args=timeout, **options)

    @sa.event.listens_for(engine, "connect")
    def set_durability(connection: sqlite3.Connection, _record: object) -> None:
        # NORMAL would survive kill -9 but not a power cut; one fsync is nothing beside an evaluation of seconds.
        connection.execute("PRAGMA synchronous=FULL")

    return engine


def _holds_bytes(path: str | Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.stat(path).st_size > 0
    return False


def _open_sqlite(path: Path) -> sa.Engine:
    has_log = _holds_bytes(f"{path}-wal")  # looked at before the file: a living store has its file first
    if not path.exists():
        if has_log:  # SQLite would replay the old log into the new file
            raise _damaged(str(path), f"is missing, but its log {path.name}-wal holds results")
        _create_sqlite(path)
    if not path.is_file():
        raise _damaged(str(path), "is not a file")
    if not _holds_bytes(path):
        raise _damaged(str(path), "is empty, and stores never are")
    # Closing a read-write connection copies a log into the file, which may be damaged or another program's. The header
    # is read through SQLite too: closing a plain file drops all locks that this process holds on it.
    mode = "ro" if has_log or _holds_bytes(f"{path}-journal") else "rw"
    with _sqlite_engine(path, mode, poolclass=sa.NullPool).connect() as connection:
        if connection.exec_driver_sql("PRAGMA application_id").scalar_one() != APPLICATION_ID:
            raise _damaged(str(path), "is a database of another program")
        if (version := connection.exec_driver_sql("PRAGMA user_version").scalar_one()) != SCHEMA_VERSION:
            raise _damaged(str(path), f"has schema version {version}; this rap-env reads only {SCHEMA_VERSION}")
        if (finding := connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()) != "ok":
            raise _damaged(str(path), f"is damaged inside ({finding.splitlines()[-1]})")
    return _sqlite_engine(path, "rw")


def _create_sqlite(path: Path) -> None:
    """Makes an empty store in a folder beside, then links it into place: processes never see a half-made file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        fresh = Path(folder) / path.name
        with _sqlite_engine(fresh, "rwc", poolclass=sa.NullPool).connect() as connection:
            connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
            connection.exec_driver_sql(f"PRAGMA user_version={SCHEMA_VERSION}")
            _METADATA.create_all(connection)
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        with contextlib.suppress(FileExistsError):  # another process was faster, and its file is as good
            os.link(fresh, path)  # the first put syncs the folder, as it creates the log there


def _open_postgresql(url: sa.URL) -> sa.Engine:
    try:
        setup = sa.create_engine(url, poolclass=sa.NullPool)
    except ImportError as error:
        raise StoreUnavailable(f"{url} needs psycopg: pip install 'rap-env[postgresql]' ({error})") from error
    with setup.begin() as connection:
        # IF NOT EXISTS alone fails when two processes create at once; the lock ends with the transaction.
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(APPLICATION_ID)))
        _METADATA.create_all(connection)
        columns = {column["name"] for column in sa.inspect(connection).get_columns(_EVALUATIONS.name)}
    if columns != set(_EVALUATIONS.columns.keys()):
        raise _damaged(str(url), f"has a table evaluations with other columns ({', '.join(sorted(columns))})")
    return sa.create_engine(url, isolation_level="AUTOCOMMIT", pool_pre_ping=True)
