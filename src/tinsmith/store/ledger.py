"""What was used, by the hour: tokens, saved checkpoints, and storage.

A row is one hour's quantity of one kind, of one session, key and model at one rate. It grows in the
transaction that makes what it counts final (a command's result, a checkpoint's row), and so counts
that exactly once. Quantities are whole numbers: tokens, checkpoints, or byte-seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from .scope import Scope
from .tables import (
    api_keys,
    checkpoints,
    meters,
    organizations,
    projects,
    runs,
    sessions,
    storage_spans,
    usage,
    users,
)

HOUR = 3600


def hour_of(seconds: float) -> int:
    """The beginning of the hour (UTC) in which a time lies."""
    return int(seconds // HOUR) * HOUR


@dataclass(frozen=True, slots=True)
class Entry:
    """So much of one kind. `session_id` and `rate` are empty where there is none."""

    hour: int
    org_id: str
    project_id: str
    session_id: str
    user_id: str
    key_id: str
    model: str
    kind: str
    rate: str
    quantity: int


_DIMENSIONS = tuple(name for name in Entry.__dataclass_fields__ if name != "quantity")


# Built once: building a statement takes longer than carrying it out, and every request has some.
_GROW = (
    usage.update()
    .where(*(usage.c[name] == sa.bindparam(f"of_{name}") for name in _DIMENSIONS))
    .values(quantity=usage.c.quantity + sa.bindparam("more"))
)
_BEGIN = usage.insert()


def add(connection: sa.Connection, entries: Iterable[Entry]) -> None:
    for entry in entries:
        values = {name: getattr(entry, name) for name in _DIMENSIONS}
        of = {f"of_{name}": value for name, value in values.items()}
        if connection.execute(_GROW, {**of, "more": entry.quantity}).rowcount == 0:
            connection.execute(_BEGIN, {**values, "quantity": entry.quantity})


def rows(connection: sa.Connection, scope: Scope, since: float, until: float) -> list[Entry]:
    """All rows of the hours that begin in [since, until), in their order. A session's usage belongs to the
    project that the session belongs to now."""
    project = sa.func.coalesce(sessions.c.project_id, usage.c.project_id).label("project_id")
    columns = [project if name == "project_id" else usage.c[name] for name in Entry.__dataclass_fields__]
    query = (
        sa.select(*columns)
        .outerjoin(sessions, sessions.c.id == usage.c.session_id)
        .where(scope.rows(usage), usage.c.hour >= since, usage.c.hour < until)
        .order_by(usage.c.hour, usage.c.pk)
    )
    return [Entry(*row) for row in connection.execute(query)]


@dataclass(frozen=True, slots=True)
class Sum:
    """What a project has used of one kind at one rate."""

    org_id: str
    project_id: str
    kind: str
    rate: str
    quantity: int


def sums(
    connection: sa.Connection, scope: Scope, since: float, until: float, session_id: str | None = None
) -> list[Sum]:
    """The quantities of the hours in [since, until), of one session if it is named, added up; storage by the
    hour, since its cost is rounded by the row."""
    project = sa.func.coalesce(sessions.c.project_id, usage.c.project_id)
    storage = usage.c.kind == "storage"
    where = [scope.rows(usage), usage.c.hour >= since, usage.c.hour < until]
    if session_id is not None:
        where.append(usage.c.session_id == session_id)
    joined = usage.outerjoin(sessions, sessions.c.id == usage.c.session_id)
    by = (usage.c.org_id, project, usage.c.kind, usage.c.rate)
    added = sa.select(*by, sa.func.sum(usage.c.quantity)).select_from(joined).where(*where, ~storage)
    apart = sa.select(*by, usage.c.quantity).select_from(joined).where(*where, storage)
    return [
        *(Sum(*row[:4], int(row[4])) for row in connection.execute(added.group_by(*by))),
        *(Sum(*row) for row in connection.execute(apart)),
    ]


# Storage: how long each checkpoint was there


@dataclass(frozen=True, slots=True)
class Span:
    """A checkpoint's life. `end` is when it was deleted, or when its time comes, or None."""

    org_id: str
    project_id: str
    session_id: str
    user_id: str
    key_id: str
    model: str
    size_bytes: int
    begin: float
    end: float | None

    def byte_seconds(self, since: int, until: int) -> int:
        """Of the time in [since, until): whole milliseconds, rounded down to whole byte-seconds."""
        first, last = max(self.begin, since), until if self.end is None else min(self.end, until)
        return self.size_bytes * max(0, int(last * 1000) - int(first * 1000)) // 1000


def begin_span(connection: sa.Connection, checkpoint_id: str, run_id: str, size: int, now: float) -> None:
    """A checkpoint of `size` bytes is there from now on; it counts as one saved checkpoint, too."""
    owner = connection.execute(
        sa.select(runs.c.org_id, runs.c.project_id, runs.c.session_id, runs.c.user_id, sessions.c.key_id,
                  runs.c.base_model)
        .join(sessions, sessions.c.id == runs.c.session_id)
        .where(runs.c.id == run_id)
    ).one()  # fmt: skip
    org_id, project_id, session_id, user_id, key_id, model = owner
    connection.execute(
        storage_spans.insert().values(
            checkpoint_id=checkpoint_id,
            org_id=org_id,
            project_id=project_id,
            session_id=session_id,
            user_id=user_id,
            key_id=key_id,
            model=model,
            size_bytes=size,
            begin_at=now,
        )
    )
    add(connection, [Entry(hour_of(now), *owner[:3], user_id, key_id, model, "checkpoint", "", 1)])


def end_span(connection: sa.Connection, checkpoint_id: str, now: float) -> None:
    """A checkpoint is deleted. One whose time had come before ended then."""
    expired = connection.scalar(sa.select(checkpoints.c.expires_at).where(checkpoints.c.id == checkpoint_id))
    end = now if expired is None else min(now, expired)
    connection.execute(
        storage_spans.update()
        .where(storage_spans.c.checkpoint_id == checkpoint_id, storage_spans.c.end_at.is_(None))
        .values(end_at=end)
    )


def spans(connection: sa.Connection, scope: Scope, since: float) -> Iterator[Span]:
    """The checkpoints that were there at `since` or came later."""
    end = sa.func.coalesce(storage_spans.c.end_at, checkpoints.c.expires_at)
    project = sa.func.coalesce(sessions.c.project_id, storage_spans.c.project_id)
    names = ("org_id", "session_id", "user_id", "key_id", "model", "size_bytes")
    columns: list[sa.ColumnElement[Any]] = [storage_spans.c[name] for name in names]
    columns += [project.label("project_id"), storage_spans.c.begin_at.label("begin"), end.label("end")]
    query = (
        sa.select(*columns)
        .outerjoin(checkpoints, checkpoints.c.id == storage_spans.c.checkpoint_id)
        .outerjoin(sessions, sessions.c.id == storage_spans.c.session_id)
        .where(scope.rows(storage_spans), end.is_(None) | (end > since))
    )
    return (Span(**row._mapping) for row in connection.execute(query))


def stored(connection: sa.Connection, scope: Scope, now: float) -> dict[str, int]:
    """Bytes of checkpoints that are there now, by project."""
    found: dict[str, int] = {}
    for span in spans(connection, scope, now):
        found[span.project_id] = found.get(span.project_id, 0) + span.size_bytes
    return found


def accrued_until(connection: sa.Connection) -> int | None:
    """Up to which hour storage is in the ledger."""
    return connection.scalar(sa.select(meters.c.value).where(meters.c.name == "storage"))


def accrue(connection: sa.Connection, entries: Iterable[Entry], until: int) -> None:
    """Enter storage up to the hour `until`."""
    add(connection, entries)
    moved = connection.execute(meters.update().where(meters.c.name == "storage").values(value=until))
    if moved.rowcount == 0:
        connection.execute(meters.insert().values(name="storage", value=until))


def names(connection: sa.Connection) -> dict[str, dict[str, str]]:
    """What the operator calls organizations, projects, users and keys, by id."""
    found = {}
    for attribute, table in (
        ("org", organizations),
        ("project", projects),
        ("user", users),
        ("key", api_keys),
    ):
        rows = connection.execute(sa.select(table.c.id, table.c.name))
        found[attribute] = {str(id_): str(name) for id_, name in rows}
    return found
