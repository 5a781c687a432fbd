"""Sampling sessions: which weights a sampling client samples from."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from .scope import SERVER, Scope
from .tables import sampling_sessions, sessions


@dataclass(frozen=True, slots=True)
class SamplingSessionRow:
    id: str
    org_id: str
    session_id: str
    created_at: float
    base_model: str
    model_path: str | None
    sampler: str | None
    folder: str | None
    ephemeral: bool
    clones: int = 0
    run_id: str | None = None
    seq_id: int | None = None


def add(connection: sa.Connection, row: SamplingSessionRow) -> SamplingSessionRow:
    """Add a sampling session, or answer the one that has its id already."""
    known = get(connection, row.id, SERVER)
    if known is not None:
        return known
    connection.execute(
        sampling_sessions.insert().values(
            {name: getattr(row, name) for name in SamplingSessionRow.__dataclass_fields__}
        )
    )
    return row


def get(connection: sa.Connection, id_: str, scope: Scope) -> SamplingSessionRow | None:
    query = sampling_sessions.select().where(scope.rows(sampling_sessions), sampling_sessions.c.id == id_)
    row = connection.execute(query).one_or_none()
    return SamplingSessionRow(**row._mapping) if row is not None else None


def ephemeral_of(connection: sa.Connection, session_id: str, scope: Scope) -> list[SamplingSessionRow]:
    query = sampling_sessions.select().where(
        scope.rows(sampling_sessions),
        sampling_sessions.c.session_id == session_id,
        sampling_sessions.c.ephemeral,
    )
    return [SamplingSessionRow(**row._mapping) for row in connection.execute(query)]


def ephemeral(connection: sa.Connection, scope: Scope) -> list[SamplingSessionRow]:
    """Those without a name, of sessions that go on, the newest first."""
    query = (
        sampling_sessions.select()
        .join(sessions, sessions.c.id == sampling_sessions.c.session_id)
        .where(scope.rows(sampling_sessions), scope.rows(sessions))
        .where(sampling_sessions.c.ephemeral, sessions.c.finished_at.is_(None))
        .order_by(sampling_sessions.c.created_at.desc())
    )
    return [SamplingSessionRow(**row._mapping) for row in connection.execute(query)]


def published_by(
    connection: sa.Connection, run_id: str, scope: Scope, since: int
) -> list[SamplingSessionRow]:
    """Those without a name that a run's commands from seq_id `since` on have published."""
    query = sampling_sessions.select().where(
        scope.rows(sampling_sessions),
        sampling_sessions.c.run_id == run_id,
        sampling_sessions.c.session_id == run_id.partition(":train:")[0],
        sampling_sessions.c.seq_id >= since,
        sampling_sessions.c.ephemeral,
    )
    return [SamplingSessionRow(**row._mapping) for row in connection.execute(query)]


def set_folder(connection: sa.Connection, sampler: str, folder: str | None) -> None:
    """Where the weights of a sampler without a name lie: all who share it."""
    mine = (sampling_sessions.c.sampler == sampler) & sampling_sessions.c.ephemeral
    connection.execute(sampling_sessions.update().where(mine).values(folder=folder))


def own_files(connection: sa.Connection) -> set[str]:
    """The blobs that samplers without a name lie in."""
    query = sa.select(sampling_sessions.c.folder).where(
        sampling_sessions.c.ephemeral, sampling_sessions.c.folder.is_not(None)
    )
    return set(connection.scalars(query))


def next_clone(connection: sa.Connection, id_: str) -> int:
    """Count one more client of a sampling session; the original one is 0."""
    connection.execute(
        sampling_sessions.update()
        .where(sampling_sessions.c.id == id_)
        .values(clones=sampling_sessions.c.clones + 1)
    )
    return int(
        connection.scalar(sa.select(sampling_sessions.c.clones).where(sampling_sessions.c.id == id_)) or 0
    )
