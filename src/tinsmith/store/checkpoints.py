"""Checkpoints: rows are added once the engine has written the folder, and then never change."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from tinsmith.wire.paths import CheckpointKind, TinkerPath

from . import ledger
from .scope import Scope
from .tables import checkpoints


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    id: str
    org_id: str
    run_id: str
    kind: CheckpointKind
    name: str
    seq_id: int
    folder: str
    size_bytes: int | None
    created_at: float
    expires_at: float | None
    user_metadata: dict[str, str] | None
    published_at: float | None = None

    @property
    def path(self) -> TinkerPath:
        return TinkerPath(self.run_id, self.kind, self.name)


@dataclass(frozen=True, slots=True)
class Replaced:
    """A checkpoint that is gone, because another one of its name was saved."""

    id: str
    folder: str


def add(connection: sa.Connection, row: CheckpointRow) -> Replaced | None:
    """Add a checkpoint; one of the same name is replaced, and comes back for the deletion of its files."""
    same = (
        (checkpoints.c.run_id == row.run_id)
        & (checkpoints.c.kind == row.kind)
        & (checkpoints.c.name == row.name)
    )
    now = time.time()
    replaced = connection.execute(sa.select(checkpoints.c.id, checkpoints.c.folder).where(same)).one_or_none()
    if replaced is not None:
        ledger.end_span(connection, replaced.id, now)
        connection.execute(checkpoints.delete().where(same))
    connection.execute(
        checkpoints.insert().values(
            id=row.id,
            org_id=row.org_id,
            run_id=row.run_id,
            kind=row.kind,
            name=row.name,
            seq_id=row.seq_id,
            folder=row.folder,
            size_bytes=row.size_bytes,
            created_at=row.created_at,
            expires_at=row.expires_at,
            published_at=row.published_at,
            user_metadata=json.dumps(row.user_metadata) if row.user_metadata is not None else None,
        )
    )
    ledger.begin_span(connection, row.id, row.run_id, row.size_bytes or 0, now)
    return None if replaced is None else Replaced(str(replaced.id), str(replaced.folder))


def find(
    connection: sa.Connection, path: TinkerPath, scope: Scope, now: float, *, published: bool = False
) -> CheckpointRow | None:
    """A checkpoint within `scope`, or with `published` also one that anybody may read."""
    readable = scope.rows(checkpoints)
    if published:
        readable |= checkpoints.c.published_at.is_not(None)
    row = connection.execute(
        checkpoints.select().where(
            readable,
            checkpoints.c.run_id == path.run,
            checkpoints.c.kind == path.kind,
            checkpoints.c.name == path.name,
            _alive(now),
        )
    ).one_or_none()
    return read(row) if row is not None else None


def get(connection: sa.Connection, checkpoint_id: str, scope: Scope, now: float) -> CheckpointRow | None:
    row = connection.execute(
        checkpoints.select().where(scope.rows(checkpoints), checkpoints.c.id == checkpoint_id, _alive(now))
    ).one_or_none()
    return read(row) if row is not None else None


def newest(
    connection: sa.Connection, run_id: str, kind: CheckpointKind, scope: Scope, now: float
) -> CheckpointRow | None:
    row = connection.execute(
        checkpoints.select()
        .where(
            scope.rows(checkpoints), checkpoints.c.run_id == run_id, checkpoints.c.kind == kind, _alive(now)
        )
        .order_by(checkpoints.c.seq_id.desc())
        .limit(1)
    ).one_or_none()
    return read(row) if row is not None else None


def of_run(connection: sa.Connection, run_id: str, scope: Scope, now: float) -> list[CheckpointRow]:
    query = checkpoints.select().where(scope.rows(checkpoints), checkpoints.c.run_id == run_id, _alive(now))
    return [read(row) for row in connection.execute(query.order_by(checkpoints.c.created_at))]


def page(
    connection: sa.Connection, scope: Scope, limit: int, offset: int, now: float
) -> tuple[list[CheckpointRow], int]:
    """A page of the checkpoints, newest first, and how many there are."""
    mine = scope.rows(checkpoints) & _alive(now)
    total = connection.scalar(sa.select(sa.func.count()).select_from(checkpoints).where(mine)) or 0
    query = checkpoints.select().where(mine).order_by(checkpoints.c.created_at.desc(), checkpoints.c.id)
    return [read(row) for row in connection.execute(query.limit(limit).offset(offset))], total


def delete(connection: sa.Connection, checkpoint_id: str) -> None:
    ledger.end_span(connection, checkpoint_id, time.time())
    connection.execute(checkpoints.delete().where(checkpoints.c.id == checkpoint_id))


def set_expiry(connection: sa.Connection, checkpoint_id: str, expires_at: float | None) -> None:
    connection.execute(
        checkpoints.update().where(checkpoints.c.id == checkpoint_id).values(expires_at=expires_at)
    )


def set_published(connection: sa.Connection, checkpoint_id: str, published_at: float | None) -> None:
    connection.execute(
        checkpoints.update().where(checkpoints.c.id == checkpoint_id).values(published_at=published_at)
    )


def expired(connection: sa.Connection, scope: Scope, now: float) -> list[CheckpointRow]:
    query = checkpoints.select().where(scope.rows(checkpoints), checkpoints.c.expires_at <= now).limit(100)
    return [read(row) for row in connection.execute(query)]


def is_there(connection: sa.Connection, checkpoint_id: str) -> bool:
    return connection.scalar(sa.select(checkpoints.c.id).where(checkpoints.c.id == checkpoint_id)) is not None


def shares_folder(connection: sa.Connection, folder: str) -> bool:
    """Whether some checkpoint still has its files in `folder`: copies share them."""
    query = sa.select(checkpoints.c.id).where(checkpoints.c.folder == folder).limit(1)
    return connection.scalar(query) is not None


def folders(connection: sa.Connection) -> set[str]:
    return {str(key) for key in connection.scalars(sa.select(checkpoints.c.folder))}


def _alive(now: float) -> sa.ColumnElement[bool]:
    return checkpoints.c.expires_at.is_(None) | (checkpoints.c.expires_at > now)


def read(row: Any) -> CheckpointRow:
    """A row (sa.Row) of the table, which may have other columns beside its own."""
    values = {name: row._mapping[name] for name in CheckpointRow.__dataclass_fields__}
    values["user_metadata"] = json.loads(values["user_metadata"]) if values["user_metadata"] else None
    return CheckpointRow(**values)
