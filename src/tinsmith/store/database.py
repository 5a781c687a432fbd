"""The database, and the one thread that writes it.

All writes go through one thread, which takes what has queued up, runs each in a savepoint of its
own, and commits them together: a hundred requests at once cost one fsync, and a failed one takes no
other along. Reads run on connections of their own. Neither ever blocks the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

log = logging.getLogger("tinsmith.store")

T = TypeVar("T")
Work = Callable[[sa.Connection], T]
_Job = tuple[Callable[[sa.Connection], Any], "Future[Any]"]

MIGRATIONS = Path(__file__).parent / "migrations"
_MOST_AT_ONCE = 256
_READERS = 4


class WriteFailed(Exception):
    """The disk did not take a write, and nothing of it happened; the message says why."""


class Store:
    def __init__(self, url: str) -> None:
        self._engine = _make_engine(url)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-read")
        self._writer = threading.Thread(target=self._write_all, name="store-write", daemon=True)
        self._closed = False

    @classmethod
    def open(cls, url: str) -> Store:
        """Open the database at `url`, bring its tables up to date, and start writing."""
        store = cls(url)
        with store._engine.connect() as it, _without_foreign_keys(it), it.begin():
            migrate(it)
        store._writer.start()
        return store

    @staticmethod
    def local_url(folder: Path) -> str:
        return f"sqlite:///{folder / 'tinsmith.db'}"

    async def write(self, work: Work[T]) -> T:
        """Run `work` in the next transaction; once this returns, its effects survive a power cut.

        Raises WriteFailed where the disk is full or gone.
        """
        return await asyncio.wrap_future(self._submit(work))

    def write_soon(self, work: Work[object]) -> None:
        """As `write`, for what may be lost and nobody waits for."""
        self._submit(work).add_done_callback(_log_failure)

    async def read(self, work: Work[T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, work)

    def write_now(self, work: Work[T]) -> T:
        """As `write`, for callers without an event loop."""
        return self._submit(work).result()

    def close(self) -> None:
        """Write what is queued, then close."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            self._writer.join()
            self._readers.shutdown()
            self._engine.dispose()

    def _submit(self, work: Work[T]) -> Future[T]:
        future: Future[T] = Future()
        if self._closed:
            future.set_exception(RuntimeError("the database is closed"))
        else:
            self._jobs.put((work, future))
        return future

    def _read(self, work: Work[T]) -> T:
        with self._engine.connect() as connection:
            return work(connection)

    def _write_all(self) -> None:
        with self._engine.connect() as connection:
            open_ = True
            while open_:
                batch: list[_Job] = []
                job = self._jobs.get()
                while job is not None:
                    batch.append(job)
                    if len(batch) >= _MOST_AT_ONCE:
                        break
                    try:
                        job = self._jobs.get_nowait()
                    except queue.Empty:
                        break
                else:
                    open_ = False
                if batch:
                    _write_batch(connection, batch)


def _log_failure(future: Future[Any]) -> None:
    if (error := future.exception()) is not None:
        log.error("something could not be written down: %s", error)


def _write_batch(connection: sa.Connection, batch: list[_Job]) -> None:
    outcomes: list[tuple[Future[Any], Any, BaseException | None]] = []
    try:
        with connection.begin():
            for work, future in batch:
                try:
                    with connection.begin_nested():
                        outcomes.append((future, work(connection), None))
                except Exception as error:
                    outcomes.append((future, None, error))
    except Exception as error:  # the commit itself: none of it happened
        outcomes = [(future, None, error) for _, future in batch]
    for future, value, failure in outcomes:
        with contextlib.suppress(InvalidStateError):  # nobody waits for it any more
            if isinstance(failure, sa.exc.OperationalError):
                future.set_exception(WriteFailed(str(failure.orig)))
            elif failure is not None:
                future.set_exception(failure)
            else:
                future.set_result(value)


def _make_engine(url: str) -> sa.Engine:
    engine = sa.create_engine(url, pool_size=_READERS + 2, max_overflow=4)
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _set_up_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions begin where we say so, not where the driver guesses
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = threading.current_thread().name == "store-write"
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextlib.contextmanager
def _without_foreign_keys(connection: sa.Connection) -> Iterator[None]:
    """SQLite changes a table by building it anew, which no reference to the old one may hinder. What
    refers to nothing afterwards is found all the same."""
    if connection.dialect.name != "sqlite":
        yield
        return
    cursor = connection.connection.cursor()
    cursor.execute("PRAGMA foreign_keys=OFF")
    try:
        yield
        broken = cursor.execute("PRAGMA foreign_key_check").fetchall()
        if broken:
            raise RuntimeError(f"the database refers to rows that are not there: {broken[:3]}")
    finally:
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()


def migrate(connection: sa.Connection) -> None:
    """Bring the tables up to date, by the migrations that are part of this package."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
