"""Client sessions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from .scope import Scope
from .tables import runs, sampling_sessions, session_metadata, sessions


@dataclass(frozen=True, slots=True)
class SessionRow:
    id: str
    org_id: str
    project_id: str
    user_id: str
    key_id: str
    created_at: float
    finished_at: float | None
    finish_reason: str | None
    finish_detail: str | None
    tags: list[str]
    user_metadata: dict[str, object] | None
    sdk_version: str
    display_name: str | None
    failure: dict[str, object] | None = None
    lost: bool = False  # the failure is that a training run's state is gone

    @property
    def texts(self) -> dict[str, str]:
        """The metadata as answers carry it and searches look for it: texts alone."""
        given = self.user_metadata or {}
        return {key: value if isinstance(value, str) else str(value) for key, value in given.items()}


def add(connection: sa.Connection, row: SessionRow) -> None:
    connection.execute(
        sessions.insert().values(
            id=row.id,
            org_id=row.org_id,
            project_id=row.project_id,
            user_id=row.user_id,
            key_id=row.key_id,
            created_at=row.created_at,
            tags=json.dumps(row.tags),
            user_metadata=json.dumps(row.user_metadata) if row.user_metadata is not None else None,
            sdk_version=row.sdk_version,
            display_name=row.display_name,
            lost=False,
            search_name=row.display_name.casefold() if row.display_name is not None else None,
            finished_at=row.finished_at,
            finish_reason=row.finish_reason,
            finish_detail=row.finish_detail,
        )
    )
    pairs = [{"session_id": row.id, "org_id": row.org_id, "key": k, "value": v} for k, v in row.texts.items()]
    if pairs:
        connection.execute(session_metadata.insert(), pairs)


def get(connection: sa.Connection, session_id: str, scope: Scope) -> SessionRow | None:
    query = sessions.select().where(scope.rows(sessions), sessions.c.id == session_id)
    row = connection.execute(query).one_or_none()
    return read(row) if row is not None else None


def unfinished(connection: sa.Connection, scope: Scope) -> list[SessionRow]:
    query = sessions.select().where(scope.rows(sessions), sessions.c.finished_at.is_(None))
    return [read(row) for row in connection.execute(query)]


def finished_since(connection: sa.Connection, scope: Scope, since: float) -> list[SessionRow]:
    query = sessions.select().where(scope.rows(sessions), sessions.c.finished_at >= since)
    return [read(row) for row in connection.execute(query)]


def page(connection: sa.Connection, scope: Scope, limit: int, offset: int) -> list[SessionRow]:
    """The newest first."""
    query = sessions.select().where(scope.rows(sessions)).order_by(sessions.c.created_at.desc())
    return [read(row) for row in connection.execute(query.limit(limit).offset(offset))]


def metadata_of(
    connection: sa.Connection, session_ids: Sequence[str], scope: Scope
) -> dict[str, dict[str, object] | None]:
    """The user metadata of those of the sessions that are within the scope."""
    found: dict[str, dict[str, object] | None] = {}
    for at in range(0, len(session_ids), 500):
        some = session_ids[at : at + 500]
        query = sa.select(sessions.c.id, sessions.c.user_metadata).where(
            scope.rows(sessions), sessions.c.id.in_(some)
        )
        for id_, text in connection.execute(query):
            found[id_] = json.loads(text) if text else None
    return found


def members(connection: sa.Connection, session_id: str, scope: Scope) -> tuple[list[str], list[str]]:
    """The ids of a session's runs and of its sampling sessions."""
    of_runs = (
        sa.select(runs.c.id)
        .where(scope.rows(runs), runs.c.session_id == session_id, runs.c.state != "failed")
        .order_by(runs.c.model_seq_id)
    )
    of_samplers = (
        sa.select(sampling_sessions.c.id)
        .where(scope.rows(sampling_sessions), sampling_sessions.c.session_id == session_id)
        .order_by(sampling_sessions.c.created_at)
    )
    return list(connection.scalars(of_runs)), list(connection.scalars(of_samplers))


def finish(
    connection: sa.Connection, session_id: str, reason: str, detail: str | None, now: float
) -> SessionRow:
    """Mark a session as finished. The first one to say so wins; the row as it is then."""
    connection.execute(
        sessions.update()
        .where(sessions.c.id == session_id, sessions.c.finished_at.is_(None))
        .values(finished_at=now, finish_reason=reason, finish_detail=detail)
    )
    return read(connection.execute(sessions.select().where(sessions.c.id == session_id)).one())


def failed(
    connection: sa.Connection, session_id: str, failure: Mapping[str, object], *, lost: bool = False
) -> None:
    """Note what went wrong last, while the session goes on. That a training run's state is gone stays
    noted, unless another one's is."""
    open_ = (sessions.c.id == session_id) & sessions.c.finished_at.is_(None)
    if not lost:
        open_ &= ~sessions.c.lost
    connection.execute(sessions.update().where(open_).values(failure=json.dumps(failure), lost=lost))


def move(connection: sa.Connection, session_id: str, project_id: str) -> str:
    """Put a session and its runs into another project. The id of the one where it was."""
    old = connection.execute(sa.select(sessions.c.project_id).where(sessions.c.id == session_id)).scalar_one()
    connection.execute(sessions.update().where(sessions.c.id == session_id).values(project_id=project_id))
    connection.execute(runs.update().where(runs.c.session_id == session_id).values(project_id=project_id))
    return str(old)


def read(row: sa.Row[tuple[object, ...]]) -> SessionRow:
    values = dict(row._mapping)
    values["tags"] = json.loads(values["tags"])
    for name in ("user_metadata", "failure"):
        values[name] = json.loads(values[name]) if values[name] else None
    del values["search_name"]
    return SessionRow(**values)
