"""Finding checkpoints by where they are, whose they are, what they carry and what they were made of."""

from __future__ import annotations

import json
from dataclasses import dataclass

import sqlalchemy as sa

from tinsmith.wire.checkpoint_search import CheckpointSearch

from .checkpoints import CheckpointRow, read
from .scope import Scope
from .tables import checkpoints, runs

_CHUNK = 500


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    row: CheckpointRow
    base_model: str


def search(
    connection: sa.Connection, scope: Scope, wanted: CheckpointSearch, now: float
) -> list[FoundCheckpoint]:
    """The checkpoints that match, newest first, one more than a page has if there are more."""
    conditions = [
        scope.rows(checkpoints),
        scope.rows(runs),
        checkpoints.c.expires_at.is_(None) | (checkpoints.c.expires_at > now),
    ]
    if wanted.project_ids is not None:
        conditions.append(runs.c.project_id.in_(wanted.project_ids))
    if wanted.owner == "user":
        conditions.append(runs.c.user_id.in_(wanted.owner_ids))
    if wanted.kind is not None:
        conditions.append(checkpoints.c.kind == wanted.kind)
    if wanted.base_models is not None:
        conditions.append(runs.c.base_model.in_(wanted.base_models))
    for key, value in wanted.user_metadata.items():
        # As the text is stored. It finds a little too much (LIKE knows no case); the rest is looked at below.
        pair = f"{json.dumps(key)}: {json.dumps(value)}"
        conditions.append(checkpoints.c.user_metadata.contains(pair, autoescape=True))
    begin: tuple[float, str] | None = None
    if wanted.cursor is not None:
        # Times on the wire are rounded, so the exact one is looked up.
        exact = connection.scalar(
            sa.select(checkpoints.c.created_at).where(
                scope.rows(checkpoints), checkpoints.c.id == wanted.cursor.checkpoint_id
            )
        )
        begin = (wanted.cursor.created_at if exact is None else exact, wanted.cursor.checkpoint_id)
    found: list[FoundCheckpoint] = []
    while len(found) <= wanted.limit:
        query = (
            sa.select(*checkpoints.c, runs.c.base_model)
            .join(runs, runs.c.id == checkpoints.c.run_id)
            .where(*conditions, *([_behind(*begin)] if begin is not None else []))
            .order_by(checkpoints.c.created_at.desc(), checkpoints.c.id)
            .limit(_CHUNK)
        )
        rows = [FoundCheckpoint(read(row), str(row.base_model)) for row in connection.execute(query)]
        found += [
            each for each in rows if wanted.user_metadata.items() <= (each.row.user_metadata or {}).items()
        ]
        if len(rows) < _CHUNK:
            break
        begin = (rows[-1].row.created_at, rows[-1].row.id)
    return found[: wanted.limit + 1]


def _behind(created_at: float, checkpoint_id: str) -> sa.ColumnElement[bool]:
    later = (checkpoints.c.created_at == created_at) & (checkpoints.c.id > checkpoint_id)
    return (checkpoints.c.created_at < created_at) | later
