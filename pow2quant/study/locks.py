"""Locks that die with their holder: in SQLite files beside a SQLite database, as advisory locks in PostgreSQL.

Neither knows timeouts or clocks: a lock is free when its process, its machine or its connection is gone.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from pow2quant.errors import MissingExtraError, OutputError

PATIENCE = 300.0
"""Seconds to wait for the lock of a study, which is held for milliseconds."""


class LockLostError(OutputError):
    """A lock went with its connection while its holder still needed it."""


class Lock(Protocol):
    """One lock, not yet taken."""

    def take(self, patience: float = 0.0) -> bool:
        """Takes it within so many seconds, or says that another holds it."""
        ...

    def free(self) -> None:
        """Gives it back."""
        ...

    def drop(self) -> None:
        """Gives it back for good: its name is not used again, and its file goes."""
        ...

    def is_held(self) -> bool:
        """Whether it is still ours: with a lost connection it is not."""
        ...


class Locks(Protocol):
    """The locks of one study, by name."""

    def __call__(self, name: str) -> Lock: ...


class FileLock:
    """An exclusive transaction on an empty SQLite file: on every system, the kernel frees it with the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None

    def take(self, patience: float = 0.0) -> bool:
        try:
            self._path.parent.mkdir(exist_ok=True)
            connection = sqlite3.connect(self._path, timeout=patience, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.OperationalError) as error:
            raise OutputError(f"{self._path.parent}: cannot be written: {error}") from error
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            connection.close()
            if "locked" not in str(error):
                raise OutputError(f"{self._path}: cannot be locked: {error}") from error
            return False
        self._connection = connection
        return True

    def free(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def drop(self) -> None:
        if self._connection is not None and os.name != "nt":  # Windows does not remove an open file
            self._path.unlink(missing_ok=True)
        self.free()

    def is_held(self) -> bool:
        return self._connection is not None


class AdvisoryLock:
    """A session's advisory lock on a connection of its own: PostgreSQL frees it when the connection ends."""

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._key = int.from_bytes(sha256(name.encode()).digest()[:8], "big", signed=True)
        self._connection: Any = None

    def take(self, patience: float = 0.0) -> bool:
        psycopg = _psycopg()
        end = time.monotonic() + patience
        try:
            connection = psycopg.connect(self._url, autocommit=True, keepalives_idle=30, keepalives_count=4)
            while not connection.execute("SELECT pg_try_advisory_lock(%s)", (self._key,)).fetchone()[0]:
                if time.monotonic() >= end:
                    connection.close()
                    return False
                time.sleep(0.02)
        except psycopg.Error as error:
            raise OutputError(f"--storage: PostgreSQL cannot be used: {_line(error)}") from error
        self._connection = connection
        return True

    def free(self) -> None:
        if self._connection is not None:
            with suppress(Exception):  # a connection that is lost has no lock either
                self._connection.close()
            self._connection = None

    def drop(self) -> None:
        self.free()

    def is_held(self) -> bool:
        if self._connection is None:
            return False
        try:
            self._connection.execute("SELECT 1")
        except _psycopg().Error:
            self.free()
            return False
        return True


@contextmanager
def held(lock: Lock) -> Iterator[None]:
    """Holds a lock. Raises OutputError when it does not become free within `PATIENCE`."""
    if not lock.take(PATIENCE):
        raise OutputError(f"the study's storage has been locked for {PATIENCE:g} seconds by another process")
    try:
        yield
    finally:
        lock.free()


def is_away(error: BaseException | None) -> bool:
    """Whether an error comes from a PostgreSQL that cannot be reached, is shutting down, or has started again."""
    while error is not None:
        if isinstance(error, LockLostError):
            return True
        if type(error).__module__.startswith("psycopg") and isinstance(
            error, (_psycopg().OperationalError, _psycopg().InterfaceError)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _psycopg() -> Any:
    try:
        import psycopg
    except ImportError as error:
        raise MissingExtraError("PostgreSQL needs psycopg: pip install 'pow2quant[search]'") from error
    return psycopg


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
