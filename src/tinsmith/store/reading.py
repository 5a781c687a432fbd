"""A data folder's database as others may look at it, while a server writes it or none does."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import sqlalchemy as sa
from alembic.config import Config
from alembic.script import ScriptDirectory

from .database import MIGRATIONS

FILE = "tinsmith.db"


class NoDatabase(Exception):
    """There is no database that this version can read; the message says why."""


@contextlib.contextmanager
def read_only(file: Path) -> Iterator[sa.Connection]:
    """A connection that sees one moment of the database and changes nothing. Raises NoDatabase."""
    if not file.is_file():
        raise NoDatabase(f"{file} does not exist; name the data folder of a server with --data")
    engine = sa.create_engine(f"sqlite:///{_uri(file)}&uri=true", poolclass=sa.NullPool)
    try:
        with engine.connect() as connection:
            check_version(file, connection)
            yield connection
    except sa.exc.DatabaseError as error:
        raise NoDatabase(f"{file} cannot be read: {error.orig}") from error
    finally:
        engine.dispose()


def check_version(file: Path, connection: sa.Connection) -> None:
    """Raises NoDatabase where another version of the tables is in the file."""
    found, wanted = _version(file, connection), _versions().get_current_head()
    if found != wanted:
        raise NoDatabase(
            f"{file} has the tables of another version of Tinsmith ({found}; this one has {wanted}): start"
            " this version's server on it once, or use the version that wrote it"
        )


def check_known(file: Path) -> None:
    """Raises NoDatabase where a server of this version could not bring the tables up to date."""
    if not file.is_file():
        raise NoDatabase(f"there is no {file.name}")
    with contextlib.closing(sqlite3.connect(_uri(file), uri=True)) as connection:
        try:
            ((found,),) = connection.execute("select version_num from alembic_version").fetchall()
        except (sqlite3.DatabaseError, ValueError):
            raise NoDatabase(f"{file.name} is no database of Tinsmith's") from None
    if found not in {script.revision for script in _versions().walk_revisions()}:
        raise NoDatabase(f"{file.name} was written by a newer version of Tinsmith ({found}); use that one")


def _version(file: Path, connection: sa.Connection) -> str:
    try:
        return str(connection.scalar(sa.text("select version_num from alembic_version")))
    except sa.exc.DatabaseError:
        raise NoDatabase(f"{file} is no database of Tinsmith's") from None


def _versions() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return ScriptDirectory.from_config(config)


def copy(source: Path, target: Path) -> None:
    """Copy a database, as it was at one moment, into the new file `target`. Writers are not held up."""
    with (
        contextlib.closing(sqlite3.connect(_uri(source), uri=True, timeout=30)) as from_,
        contextlib.closing(sqlite3.connect(target)) as to,
    ):
        from_.backup(to, pages=-1)
        to.execute("pragma journal_mode=delete")


def _uri(file: Path) -> str:
    return f"file:{quote(str(file.resolve()))}?mode=ro"
