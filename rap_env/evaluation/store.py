"""The result store: every finished evaluation, kept under its full identity, shared by processes, never lost.

Each write is one transaction, so a killed writer leaves whole rows or none. Beside the results stand claims: who is
measuring what, so that nobody measures it twice.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa

from rap_env.evaluation.database import CLAIMS, EVALUATIONS, Database, damaged
from rap_env.evaluation.owners import is_gone, this_process

_FIND = sa.select(EVALUATIONS.c.digest, EVALUATIONS.c.identity, EVALUATIONS.c.result).where(
    EVALUATIONS.c.digest.in_(sa.bindparam("digests", expanding=True))
)


def _json(kind: str, value: Mapping, **options: object) -> str:
    try:
        return json.dumps(dict(value), allow_nan=False, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected {kind} of finite JSON values; {error}: {value!r}") from error


def _renewal() -> sa.Update:
    return sa.update(CLAIMS).where(CLAIMS.c.owner == this_process()).values(renewed_at=time.time())


def _canonical_json(identity: Mapping) -> str:
    return _json("an identity", identity, sort_keys=True, separators=(",", ":"))


def identity_digest(identity: Mapping) -> str:
    """SHA-256 over the canonical JSON of an identity, hexadecimal; the order of the keys doesn't matter.

    Raises:
        ValueError: The identity holds NaN, infinity, or something that JSON can't express.
    """
    return hashlib.sha256(_canonical_json(identity).encode()).hexdigest()


class ResultStore:
    """Finished evaluations under their full identity, in SQLite or PostgreSQL; safe among threads and processes.

    A missing file and its folders are created. A file that is there already must be a whole store: an empty one is
    refused like any other damage, because stores appear complete and only a lost store leaves no bytes. The check at
    opening reads the file once. A store may be pickled and may be open across a fork.

    Opening and every method may raise `StoreDamaged` and `StoreUnavailable`; an identity or a result that is not made
    of finite JSON values is a `ValueError`.

    Args:
        location: A path (`~` is the home folder), `sqlite:///path`, or `postgresql+psycopg://user@host/database`.

    Raises:
        ValueError: The location is neither, or names a store in memory.
        StoreDamaged: What is there can't be read, or has another schema; it is left as it was found.
        StoreUnavailable: It can't be used now: no permission, no server, no driver, locked for too long, full.
    """

    def __init__(self, location: str | Path | sa.URL) -> None:
        self._database = Database(location)

    def get(self, identity: Mapping) -> dict | None:
        """The stored result of exactly this identity, or None; a row of another identity counts as damage."""
        return self.get_many([identity])[0]

    def get_many(self, identities: Sequence[Mapping]) -> list[dict | None]:
        """As `get` for each identity, in one statement."""
        asked = {hashlib.sha256(text.encode()).hexdigest(): text for text in map(_canonical_json, identities)}
        with self._database.connection() as connection:
            rows = connection.execute(_FIND, {"digests": list(asked)}).all()
        found = {row.digest: self._result(row, asked[row.digest]) for row in rows}
        return [found.get(identity_digest(identity)) for identity in identities]

    def _result(self, row: sa.Row, asked: str) -> dict:
        if row.identity != asked:
            found = f"holds another identity under {row.digest}: asked {asked}, found {row.identity}"
            raise damaged(self._database.name, found)
        return self._read(row.result, f"result under {row.digest}")

    def evaluations(self, part: str) -> Iterator[tuple[dict, dict]]:
        """Identity and result of each finished evaluation whose identity, as JSON, holds a text; in no order."""
        holding = sa.select(EVALUATIONS.c.identity, EVALUATIONS.c.result).where(EVALUATIONS.c.identity.contains(part))
        with self._database.connection() as connection:
            rows = connection.execute(holding).all()
        for row in rows:
            yield self._read(row.identity, "identity"), self._read(row.result, "result")

    def _read(self, text: str, what: str) -> dict:
        try:
            if isinstance(found := json.loads(text), dict):
                return found
            raise TypeError(f"expected an object; got {text[:40]!r}")
        except (TypeError, ValueError, RecursionError) as error:
            raise damaged(self._database.name, f"holds no JSON {what}: {error}") from error

    def put(self, identity: Mapping, result: Mapping) -> None:
        """Stores a result; on disk when this returns, and the claim on it ends. The first result of an identity stays.

        Raises:
            ValueError: Also if the result would not come back equal from JSON.
        """
        digest, text = identity_digest(identity), _json("a result", result)
        # A stored result must equal the fresh one, or a search would depend on who evaluated first.
        if json.loads(text) != dict(result):
            raise ValueError(f"expected lists and string keys, as tuples and other keys change in JSON; got {result!r}")
        row = (digest, _canonical_json(identity), text, datetime.now(UTC).isoformat())
        with self._database.transaction() as connection:
            if connection.scalar(sa.select(EVALUATIONS.c.digest).where(EVALUATIONS.c.digest == digest)) is None:
                connection.execute(sa.insert(EVALUATIONS).values(row))
            connection.execute(sa.delete(CLAIMS).where(CLAIMS.c.digest == digest))
            connection.execute(_renewal())

    def claim(self, identities: Sequence[Mapping]) -> list[bool]:
        """Takes the right to measure what has no result and is claimed by nobody, this process included.

        A claim ends with `put`, with `release`, or with its process (on another host: as `owners.is_gone` says). Most
        callers want `claims.measured_once`, which also renews claims and waits for the rest.

        Returns:
            For each identity whether it is the caller's to measure now.
        """
        digests = [identity_digest(identity) for identity in identities]
        with self._database.transaction() as connection:
            finished = connection.scalars(sa.select(EVALUATIONS.c.digest).where(EVALUATIONS.c.digest.in_(digests)))
            free = set(digests) - set(finished)
            claims = connection.execute(sa.select(CLAIMS).where(CLAIMS.c.digest.in_(free))).all()
            free -= {claim.digest for claim in claims if not self._is_gone(claim)}
            connection.execute(sa.delete(CLAIMS).where(CLAIMS.c.digest.in_(free)))
            if free:
                mine = {"owner": this_process(), "renewed_at": time.time()}
                connection.execute(sa.insert(CLAIMS), [{"digest": digest, **mine} for digest in free])
        return [digest in free for digest in digests]

    def renew(self) -> None:
        """Tells other hosts that this process is alive: all of its claims last for another `owners.LEASE_SECONDS`."""
        with self._database.transaction() as connection:
            connection.execute(_renewal())

    def _is_gone(self, claim: sa.Row) -> bool:
        try:
            return is_gone(claim.owner, claim.renewed_at)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise damaged(self._database.name, f"holds a claim of nobody ({claim.owner!r:.80})") from error

    def release(self, identities: Sequence[Mapping]) -> None:
        """Gives up this process's claims, so that others may measure; claims of others stay."""
        digests = [identity_digest(identity) for identity in identities]
        with self._database.transaction() as connection:
            connection.execute(sa.delete(CLAIMS).where(CLAIMS.c.digest.in_(digests), CLAIMS.c.owner == this_process()))

    def __len__(self) -> int:
        with self._database.connection() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(EVALUATIONS))

    @property
    def bytes(self) -> int:
        """What the results take on disk, with their indices; of an SQLite store all of it, without its log."""
        return self._database.bytes(EVALUATIONS)

    def __bool__(self) -> bool:
        return True  # without this an empty store is false, and `if store:` would never fill it

    def close(self) -> None:
        """Closes the connections of this process; using the store afterwards opens them again."""
        self._database.close()

    def __enter__(self) -> "ResultStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple:
        return ResultStore, (self._database.location,)
