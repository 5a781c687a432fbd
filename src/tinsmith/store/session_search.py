"""Finding sessions by what they are called, carry, and have come to."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa

from tinsmith.wire.session_search import SessionSearch, StatusFilter

from .scope import Scope
from .sessions import SessionRow, read
from .tables import checkpoints, runs, session_metadata, sessions


@dataclass(frozen=True, slots=True)
class FoundSession:
    row: SessionRow
    checkpoints: int
    checkpoint_bytes: int


def search(
    connection: sa.Connection, scope: Scope, wanted: SessionSearch, alive: Collection[str], now: float
) -> list[FoundSession]:
    """The sessions that match, newest first, one more than a page has if there are more. `alive` are those
    whose clients are heard of."""
    conditions = [scope.rows(sessions)]
    either = [sessions.c.id == wanted.session_id] if wanted.session_id is not None else []
    if wanted.display_name:
        words = [sessions.c.search_name.contains(word, autoescape=True) for word in wanted.display_name]
        either.append(sa.and_(*words))
    if either:
        conditions.append(sa.or_(*either))
    if wanted.project_ids is not None:
        conditions.append(sessions.c.project_id.in_(wanted.project_ids))
    if wanted.owner == "user":
        conditions.append(sessions.c.user_id.in_(wanted.owner_ids))
    for key, value in wanted.user_metadata.items():
        pair = (session_metadata.c.key == key) & (session_metadata.c.value == value)
        mine = scope.rows(session_metadata) & (session_metadata.c.session_id == sessions.c.id)
        conditions.append(sa.exists().where(mine, pair))
    if wanted.statuses is not None:
        conditions.append(sa.or_(*(_has_status(each, alive) for each in wanted.statuses)))
    if wanted.cursor is not None:
        # Times on the wire are rounded, so the exact one is looked up.
        exact = connection.scalar(
            sa.select(sessions.c.created_at).where(
                scope.rows(sessions), sessions.c.id == wanted.cursor.session_id
            )
        )
        when = wanted.cursor.created_at if exact is None else exact
        later = (sessions.c.created_at == when) & (sessions.c.id > wanted.cursor.session_id)
        conditions.append((sessions.c.created_at < when) | later)
    query = sessions.select().where(*conditions).order_by(sessions.c.created_at.desc(), sessions.c.id)
    rows = [read(row) for row in connection.execute(query.limit(wanted.limit + 1))]
    held = (
        sa.select(runs.c.session_id, sa.func.count(), sa.func.sum(checkpoints.c.size_bytes))
        .join(checkpoints, checkpoints.c.run_id == runs.c.id)
        .where(
            scope.rows(runs),
            scope.rows(checkpoints),
            runs.c.session_id.in_([row.id for row in rows]),
            checkpoints.c.expires_at.is_(None) | (checkpoints.c.expires_at > now),
        )
        .group_by(runs.c.session_id)
    )
    of = {session_id: (count, size or 0) for session_id, count, size in connection.execute(held)}
    return [FoundSession(row, *of.get(row.id, (0, 0))) for row in rows]


def _has_status(wanted: StatusFilter, alive: Collection[str]) -> sa.ColumnElement[bool]:
    """The same that `service.session_status.status_of` says of a row."""
    finished = sessions.c.finished_at.is_not(None)
    erred = finished & (sessions.c.finish_reason == "errored") & sessions.c.failure.is_not(None)
    if wanted.kind == "failed":
        return erred | (~finished & sessions.c.lost)
    if wanted.kind == "client_finished":
        return finished & ~erred & sessions.c.finish_reason.in_(wanted.reasons)
    if wanted.kind == "active":
        return ~finished & ~sessions.c.lost & sessions.c.id.in_(alive)
    return finished & (sessions.c.finish_reason == "cancelled")
