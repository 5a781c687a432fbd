"""What the operator's commands share: the data folder, organizations by name, tables and JSON."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias, TypeVar

from tinsmith.service.administration import Administration
from tinsmith.service.audit import Actor
from tinsmith.service.key_administration import KeyAdministration
from tinsmith.service.limit_administration import LimitAdministration
from tinsmith.service.named import AdminError
from tinsmith.service.session_administration import SessionAdministration
from tinsmith.store import Connection, DatabaseError, Store, WriteFailed

from .options import add_settings, read_settings

T = TypeVar("T")
Actions: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}


class Office:
    """An open data folder, on which a server may be running."""

    def __init__(self, store: Store, as_json: bool) -> None:
        actor = Actor.operator(getpass.getuser())
        self.people = Administration(store, actor)
        self.keys = KeyAdministration(store, actor)
        self.limits = LimitAdministration(store, actor)
        self.sessions = SessionAdministration(store, actor)
        self._store = store
        self._as_json = as_json

    def read(self, work: Callable[[Connection], T]) -> T:
        """What `work` finds in the database."""
        return self._store.write_now(work)

    def org(self, wanted: str | None) -> str:
        """The id of the organization that is meant; where there is only one it need not be named."""
        if wanted is not None:
            return self.people.org(wanted).id
        every = self.people.orgs()
        if len(every) != 1:
            names = ", ".join(org.name for org in every) or "none yet"
            raise AdminError(f"--org: which organization? There are: {names}")
        return every[0].id

    def say(self, sentence: str, values: object) -> None:
        """What was done: a sentence for people, values for programs."""
        print(json.dumps(values, indent=2) if self._as_json else sentence)

    def table(self, rows: Sequence[dict[str, object]], columns: dict[str, str]) -> None:
        """A table of the `columns` (name: heading) for people, everything for programs."""
        if self._as_json:
            print(json.dumps(rows, indent=2))
            return
        lines = [list(columns.values()), *([_cell(row.get(name)) for name in columns] for row in rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        for line in lines:
            print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())

    def sheet(self, values: dict[str, object]) -> None:
        """One thing, a property a line."""
        if self._as_json:
            print(json.dumps(values, indent=2))
            return
        width = max(len(name) for name in values)
        for name, value in values.items():
            print(f"{name.replace('_', ' '):{width}}  {_cell(value)}")


Run: TypeAlias = Callable[[argparse.Namespace, "Office"], None]


def add_action(
    actions: Actions, name: str, run: Run, help_: str, *, org: bool = True
) -> argparse.ArgumentParser:
    """An action of a command: `run` is called with the open data folder."""
    action: argparse.ArgumentParser = actions.add_parser(name, help=help_)
    if org:
        action.add_argument("--org", help="the organization, by name or id (default: the only one there is)")
    action.add_argument("--json", action="store_true", help="answer JSON")
    add_settings(action, only=("data",))
    action.set_defaults(run=lambda arguments: _run(arguments, run))
    return action


def _run(arguments: argparse.Namespace, run: Run) -> int:
    with _open(arguments) as office:
        try:
            run(arguments, office)
        except AdminError as error:
            print(f"tinsmith: {error}", file=sys.stderr)
            return 1
    return 0


@contextlib.contextmanager
def _open(arguments: argparse.Namespace) -> Iterator[Office]:
    data = read_settings(arguments).data
    data.mkdir(parents=True, exist_ok=True)
    store = Store.open(Store.local_url(data))
    try:
        yield Office(store, arguments.json)
    finally:
        store.close()


def log_act(data: Path, work: Callable[[Connection, Actor], None]) -> None:
    """Write something that was done with a data folder into its audit log, where the folder takes it."""
    actor = Actor.operator(getpass.getuser())
    try:
        store = Store.open(Store.local_url(data))
        try:
            store.write_now(lambda connection: work(connection, actor))
        finally:
            store.close()
    except (WriteFailed, DatabaseError, OSError) as error:
        print(f"note: the audit log could not be written: {error}", file=sys.stderr)


def needs_yes(arguments: argparse.Namespace, what: str) -> None:
    """Raises AdminError unless what cannot be undone was confirmed."""
    if not arguments.yes:
        raise AdminError(f"{what}, and this cannot be undone; say --yes if you mean it")


def add_yes(action: argparse.ArgumentParser) -> None:
    action.add_argument("--yes", action="store_true", help="do it: it cannot be undone")


def duration(text: str) -> float:
    """A span of time as people write it, 30d or 12h, in seconds."""
    match = re.fullmatch(r"(\d{1,9})([smhdwy])", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no span of time; write 30d or 12h")
    return float(match[1]) * _UNITS[match[2]]


def moment(text: str) -> float:
    """A point of time, in seconds since 1970: a span from now (30d), or a date (2027-01-31)."""
    if re.fullmatch(r"\d+[smhdwy]", text.strip()):
        return time.time() + duration(text)
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        message = f"{text!r} is no point of time; write 30d, or 2027-01-31"
        raise argparse.ArgumentTypeError(message) from None
    return (when if when.tzinfo is not None else when.replace(tzinfo=UTC)).timestamp()


def shown_time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(_cell(item) for item in value) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    # Texts of users must not move the cursor, or look like rows of their own.
    return "".join(letter if letter.isprintable() else " " for letter in str(value))
