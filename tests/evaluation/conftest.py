"""Fixtures of the store's tests: stores in SQLite, and a PostgreSQL server where one is installed."""

import glob
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import sqlalchemy as sa

from rap_env.evaluation.store import ResultStore


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "results.db"


@pytest.fixture
def store(path):
    with ResultStore(path) as opened:
        yield opened


def _postgresql_command(name: str) -> str | None:
    return shutil.which(name) or next(iter(sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)), None)


@pytest.fixture(scope="session")
def server():
    """A server of our own on a socket in a temporary folder; run by `nobody` if we are root, as it refuses root."""
    pytest.importorskip("psycopg", reason="psycopg is not installed", exc_type=ImportError)
    initdb, pg_ctl = _postgresql_command("initdb"), _postgresql_command("pg_ctl")
    if not initdb or not pg_ctl:
        pytest.skip("no PostgreSQL server (initdb, pg_ctl) installed")
    folder = tempfile.mkdtemp(dir="/tmp", prefix="rap-pg-")  # a socket's path must be short
    user = "nobody" if os.geteuid() == 0 else None
    if user:
        shutil.chown(folder, user)
    run = {"user": user, "cwd": folder, "check": True, "stdout": subprocess.DEVNULL}
    data = f"{folder}/data"
    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    try:
        subprocess.run([initdb, "-D", data, "-U", "rap", "-A", "trust", "--no-sync", "-E", "UTF8"], **run)
        subprocess.run([pg_ctl, "-D", data, "-l", f"{folder}/log", "-w", "-o", options, "start"], **run)
        try:
            yield folder
        finally:
            subprocess.run([pg_ctl, "-D", data, "-m", "immediate", "-w", "stop"], **run)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def administer(server):
    """Runs one SQL statement on the server's first database."""
    url = sa.URL.create("postgresql+psycopg", "rap", database="postgres", query={"host": server})
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)

    def execute(statement: str) -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)

    return execute


@pytest.fixture
def database_url(server, administer) -> str:
    name = f"d{os.urandom(4).hex()}"
    administer(f"CREATE DATABASE {name}")
    return f"postgresql://rap:secret@/{name}?host={server}"


@pytest.fixture(params=["sqlite", "postgresql"])
def location(request, path) -> str:
    """Where a new store may be made, in either database."""
    return str(path) if request.param == "sqlite" else request.getfixturevalue("database_url")
