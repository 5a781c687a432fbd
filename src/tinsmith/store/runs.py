"""Training runs: what they are, and where their state lies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa

from tinsmith.wire.optimizers import Family

from .scope import Scope
from .tables import runs

RunState = Literal["fresh", "live", "failed", "copy"]


@dataclass(frozen=True, slots=True)
class RunRow:
    id: str
    org_id: str
    project_id: str
    user_id: str
    session_id: str
    model_seq_id: int
    created_at: float
    last_request_at: float
    state: RunState
    base_model: str
    lora: dict[str, object]
    user_metadata: dict[str, object] | None
    fingerprint: str
    dtype: str
    versions: dict[str, str]
    snapshot: str | None = None
    snapshot_seq: int | None = None
    optimizer: Family = "adamw"
    turn_seq: int | None = None
    lost: str | None = None


def add(connection: sa.Connection, row: RunRow) -> bool:
    """Whether the run is new. An earlier one of the same place in its session stays as it is."""
    known = connection.scalar(sa.select(runs.c.id).where(runs.c.id == row.id))
    if known is not None:
        return False
    connection.execute(
        runs.insert().values(
            id=row.id,
            org_id=row.org_id,
            project_id=row.project_id,
            user_id=row.user_id,
            session_id=row.session_id,
            model_seq_id=row.model_seq_id,
            created_at=row.created_at,
            last_request_at=row.last_request_at,
            state=row.state,
            base_model=row.base_model,
            lora=json.dumps(row.lora),
            optimizer=row.optimizer,
            user_metadata=json.dumps(row.user_metadata) if row.user_metadata is not None else None,
            fingerprint=row.fingerprint,
            dtype=row.dtype,
            versions=json.dumps(row.versions),
            snapshot=row.snapshot,
            snapshot_seq=row.snapshot_seq,
        )
    )
    return True


def get(connection: sa.Connection, run_id: str, scope: Scope) -> RunRow | None:
    query = runs.select().where(scope.rows(runs), runs.c.id == run_id)
    row = connection.execute(query).one_or_none()
    return _read(row) if row is not None else None


def set_state(connection: sa.Connection, run_id: str, state: RunState) -> None:
    connection.execute(runs.update().where(runs.c.id == run_id).values(state=state))


def set_snapshot(connection: sa.Connection, run_id: str, snapshot: str, seq: int) -> str | None:
    """Write down where a run's state after the command `seq` lies. Answers the earlier snapshot, which
    nothing needs any more."""
    earlier: str | None = connection.scalar(sa.select(runs.c.snapshot).where(runs.c.id == run_id))
    connection.execute(runs.update().where(runs.c.id == run_id).values(snapshot=snapshot, snapshot_seq=seq))
    return earlier


def set_turn(connection: sa.Connection, run_id: str, seq: int) -> None:
    """All numbers up to `seq` have had their turn."""
    connection.execute(runs.update().where(runs.c.id == run_id).values(turn_seq=seq))


def set_lost(connection: sa.Connection, run_id: str, why: str) -> None:
    connection.execute(runs.update().where(runs.c.id == run_id).values(lost=why))


def drop_snapshots(connection: sa.Connection, session_id: str) -> list[str]:
    """Forget the snapshots of a session's runs. Answers their keys."""
    mine = (runs.c.session_id == session_id) & runs.c.snapshot.is_not(None)
    keys = [str(key) for key in connection.scalars(sa.select(runs.c.snapshot).where(mine))]
    connection.execute(runs.update().where(mine).values(snapshot=None, snapshot_seq=None))
    return keys


def snapshots(connection: sa.Connection) -> set[str]:
    query = sa.select(runs.c.snapshot).where(runs.c.snapshot.is_not(None))
    return {str(key) for key in connection.scalars(query)}


def touch(connection: sa.Connection, used: dict[str, float]) -> None:
    query = runs.update().where(runs.c.id == sa.bindparam("run")).values(last_request_at=sa.bindparam("at"))
    if rows := [{"run": run_id, "at": when} for run_id, when in used.items()]:
        connection.execute(query, rows)


def page(connection: sa.Connection, scope: Scope, limit: int, offset: int) -> tuple[list[RunRow], int]:
    """A page of the runs, newest first, and how many there are."""
    mine = scope.rows(runs) & (runs.c.state != "failed")
    total = connection.scalar(sa.select(sa.func.count()).select_from(runs).where(mine)) or 0
    query = runs.select().where(mine).order_by(runs.c.created_at.desc(), runs.c.id)
    return [_read(row) for row in connection.execute(query.limit(limit).offset(offset))], total


def _read(row: sa.Row[tuple[object, ...]]) -> RunRow:
    values = dict(row._mapping)
    for name in ("lora", "versions"):
        values[name] = json.loads(values[name])
    values["user_metadata"] = json.loads(values["user_metadata"]) if values["user_metadata"] else None
    return RunRow(**values)
