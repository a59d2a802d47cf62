"""The database under the result store: made, checked and opened in SQLite or PostgreSQL, and its errors explained.

The SQLite file is in write-ahead mode, where readers never wait for writers; it wants a local disk, as SQLite's locks
fail on network ones.
"""

import contextlib
import errno
import os
import sqlite3
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from rap_env.errors import RapError, StoreDamaged, StoreUnavailable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_TIMEOUT_SECONDS = 60.0
SCHEMA_VERSION = 2  # 1 had no claims, and identities without tokenizer, engine and platform
APPLICATION_ID = 0x52415053  # "RAPS" in SQLite's header: tells our files from other programs' databases

_METADATA = sa.MetaData()
EVALUATIONS = sa.Table(
    "evaluations",
    _METADATA,
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("identity", sa.Text, nullable=False),
    sa.Column("result", sa.Text, nullable=False),
    sa.Column("created_at", sa.Text, nullable=False),
)
CLAIMS = sa.Table(
    "claims",
    _METADATA,
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("renewed_at", sa.Double, nullable=False),  # seconds since 1970
)
_LOCK = f"SELECT pg_advisory_xact_lock({APPLICATION_ID})"  # ends with the transaction
# SQLITE_ERROR is "no such table" here, as the statements are fixed.
_SQLITE_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR)
_POSTGRESQL_DAMAGE = ("XX", "42P01", "42703")  # internal error or corruption, no such table, no such column
_MOVE_AWAY = "move it away (a file with its -wal and -shm files) to begin a new one"


class Database:
    """The tables of a result store; safe among threads and processes, and open across a fork.

    Args:
        location: As of `ResultStore`.

    Attributes:
        location: The absolute path, or the URL.
        name: What messages call it: the path, or the URL without its password.
    """

    def __init__(self, location: str | Path | sa.URL) -> None:
        self.location = _path_or_url(location)
        self.name = str(self.location)
        is_file = isinstance(self.location, Path)
        self._begin = ("BEGIN IMMEDIATE",) if is_file else ("BEGIN", _LOCK)
        with _IN_USE, _explained(self.name):
            self._engine = (_open_sqlite if is_file else _open_postgresql)(self.location)
            _ENGINES.add(self._engine)

    @contextlib.contextmanager
    def connection(self) -> Iterator[sa.Connection]:
        """A connection in autocommit; what the database raises inside becomes `StoreDamaged` or `StoreUnavailable`."""
        with _IN_USE, _explained(self.name), self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """A connection that alone may write until the block ends; a block that raises has written nothing."""
        with self.connection() as connection:
            for statement in self._begin:
                connection.exec_driver_sql(statement)
            try:
                yield connection
                connection.exec_driver_sql("COMMIT")
            except BaseException:
                with contextlib.suppress(sa.exc.SQLAlchemyError):  # the connection is lost, or has rolled back already
                    connection.exec_driver_sql("ROLLBACK")
                raise

    def bytes(self, table: sa.Table) -> int:
        """What a table takes on disk with its indices; of an SQLite file all of it, without its log."""
        with self.connection() as connection:
            if isinstance(self.location, Path):
                pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
                return pages * connection.exec_driver_sql("PRAGMA page_size").scalar_one()
            return connection.scalar(sa.select(sa.func.pg_total_relation_size(table.name)))

    def close(self) -> None:
        """Closes the connections of this process; later use opens them again."""
        with _IN_USE:
            self._engine.dispose()


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


def damaged(name: str, finding: str, advice: str = f"restore it from a copy, or {_MOVE_AWAY}") -> StoreDamaged:
    """The error for a store that can't be read, with what was found and what to do."""
    return StoreDamaged(f"the result store {name} {finding}; it was left unchanged: {advice}")


def _other_schema(name: str, version: int) -> StoreDamaged:
    return damaged(name, f"has schema version {version}, and this rap-env reads only {SCHEMA_VERSION}", _MOVE_AWAY)


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
            raise damaged(name, f"can't be read ({cause})") from error
        raise StoreUnavailable(f"the result store {name} can't be used now: {cause}") from error
    except RapError:
        raise
    except OSError as error:
        advice = "choose another folder ($RAP_CACHE or store=...)"
        raise StoreUnavailable(f"the result store {name} can't be opened or created: {error}; {advice}") from error


def _path_or_url(location: str | Path | sa.URL) -> Path | sa.URL:
    if isinstance(location, Path) or (isinstance(location, str) and "://" not in location):
        return Path(os.path.expanduser(location)).resolve()
    try:
        url = sa.make_url(location)
    except sa.exc.ArgumentError as error:
        raise ValueError(f"expected a path, sqlite:///path or postgresql+psycopg://...; {error}") from error
    if (backend := url.drivername.split("+")[0]) not in ("sqlite", "postgresql"):
        raise ValueError(f"expected a result store in sqlite or postgresql; got {backend!r}")
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if url.database in (None, "", ":memory:") or url.query:
        raise ValueError(f"expected sqlite:///path, without options and not in memory; got {str(url)!r}")
    return Path(os.path.expanduser(url.database)).resolve()


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
            raise damaged(str(path), f"is missing, but its log {path.name}-wal holds results")
        _create_sqlite(path)
    if not path.is_file():
        raise damaged(str(path), "is not a file")
    if not _holds_bytes(path):
        raise damaged(str(path), "is empty, and stores never are")
    if not os.access(path, os.W_OK):  # else the log and index that SQLite makes to read it shut its owner out
        raise PermissionError(errno.EACCES, "this user may not write to it", str(path))
    # Closing a read-write connection copies a log into the file, which may be damaged or another program's. The header
    # is read through SQLite too: closing a plain file drops all locks that this process holds on it.
    mode = "ro" if has_log or _holds_bytes(f"{path}-journal") else "rw"
    with _sqlite_engine(path, mode, poolclass=sa.NullPool).connect() as connection:
        if connection.exec_driver_sql("PRAGMA application_id").scalar_one() != APPLICATION_ID:
            raise damaged(str(path), "is a database of another program")
        if (version := connection.exec_driver_sql("PRAGMA user_version").scalar_one()) != SCHEMA_VERSION:
            raise _other_schema(str(path), version)
        if (finding := connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()) != "ok":
            raise damaged(str(path), f"is damaged inside ({finding.splitlines()[-1]})")
    return _sqlite_engine(path, "rw")


def _create_sqlite(path: Path) -> None:
    """Makes an empty store in a folder beside, then moves it into place: processes never see a half-made file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        fresh = Path(folder) / path.name
        fresh.touch()  # by the umask: SQLite itself would never let a group write
        with _sqlite_engine(fresh, "rwc", poolclass=sa.NullPool).connect() as connection:
            connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
            connection.exec_driver_sql(f"PRAGMA user_version={SCHEMA_VERSION}")
            _METADATA.create_all(connection)
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        with contextlib.suppress(FileExistsError):  # another process was faster, and its file is as good
            _publish(fresh, path)  # the first put syncs the folder, as it creates the log there


def _publish(fresh: Path, path: Path) -> None:
    """Gives a finished file its name, or raises `FileExistsError`: never replaces what another process published."""
    try:
        os.link(fresh, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links here (exFAT, mounted drives)
        if fcntl is None:
            os.rename(fresh, path)  # on Windows it never replaces a file
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # freed by closing, and by the death of the process
            if not path.exists():
                os.rename(fresh, path)
        finally:
            os.close(folder)


def _open_postgresql(url: sa.URL) -> sa.Engine:
    try:
        setup = sa.create_engine(url, poolclass=sa.NullPool)
    except ImportError as error:
        raise StoreUnavailable(f"{url} needs psycopg: pip install 'rap-env[postgresql]' ({error})") from error
    with setup.begin() as connection:
        connection.exec_driver_sql(_LOCK)  # IF NOT EXISTS alone fails when two processes create at once
        inspector = sa.inspect(connection)
        present = {table.name for table in _METADATA.sorted_tables if inspector.has_table(table.name)}
        for name in sorted(present):
            columns = {column["name"] for column in inspector.get_columns(name)}
            if columns != set(_METADATA.tables[name].columns.keys()):
                raise damaged(str(url), f"has a table {name} with other columns ({', '.join(sorted(columns))})")
        if present == {EVALUATIONS.name}:
            raise _other_schema(str(url), 1)
        _METADATA.create_all(connection)
    return sa.create_engine(url, isolation_level="AUTOCOMMIT", pool_pre_ping=True)
