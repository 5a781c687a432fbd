"""What is known of past requests' times: packed, a few hundred of a session in a row."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from .scope import Scope
from .tables import trace_chunks


@dataclass(frozen=True, slots=True)
class TraceChunk:
    org_id: str
    session_id: str
    written_at: float
    requests: int
    data: bytes


def add(connection: sa.Connection, chunk: TraceChunk) -> None:
    connection.execute(
        trace_chunks.insert().values(
            **{name: getattr(chunk, name) for name in TraceChunk.__dataclass_fields__}, size=len(chunk.data)
        )
    )


def of_session(connection: sa.Connection, session_id: str, scope: Scope) -> list[bytes]:
    query = sa.select(trace_chunks.c.data).where(
        scope.rows(trace_chunks), trace_chunks.c.session_id == session_id
    )
    return list(connection.scalars(query.order_by(trace_chunks.c.pk)))


def keep_newest(connection: sa.Connection, session_id: str, most: int) -> int:
    """Forget a session's oldest chunks until it has at most `most` requests, more or less. Answers how many
    it has."""
    query = sa.select(trace_chunks.c.pk, trace_chunks.c.requests)
    rows = connection.execute(
        query.where(trace_chunks.c.session_id == session_id).order_by(trace_chunks.c.pk.desc())
    )
    kept = 0
    for pk, requests in rows.all():
        if kept and kept + requests > most:
            connection.execute(
                trace_chunks.delete().where(trace_chunks.c.session_id == session_id, trace_chunks.c.pk <= pk)
            )
            break
        kept += requests
    return kept


def drop_old(connection: sa.Connection, written_before: float, most_bytes: int) -> None:
    """Forget what is too old, and then the oldest until no more than `most_bytes` are left."""
    connection.execute(trace_chunks.delete().where(trace_chunks.c.written_at < written_before))
    total = connection.scalar(sa.select(sa.func.sum(trace_chunks.c.size))) or 0
    while total > most_bytes:
        query = sa.select(trace_chunks.c.pk, trace_chunks.c.size).order_by(trace_chunks.c.pk).limit(256)
        last = 0
        for pk, size in connection.execute(query).all():
            if total <= most_bytes:
                break
            last, total = pk, total - size
        connection.execute(trace_chunks.delete().where(trace_chunks.c.pk <= last))
