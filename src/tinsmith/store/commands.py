"""The command log: every training request of every run, in order, and what became of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa

from .scope import Scope
from .tables import checkpoints, commands, runs, sessions

Status = Literal["queued", "done", "failed"]
ResultType = Literal["json", "protobuf"]


@dataclass(frozen=True, slots=True)
class CommandRow:
    org_id: str
    run_id: str
    seq_id: int
    request_id: str
    kind: str
    body: bytes | None
    body_key: str | None
    encoding: str
    arrived_at: float
    status: Status = "queued"
    result: bytes | None = None
    result_key: str | None = None
    result_type: ResultType | None = None
    error: str | None = None
    category: str | None = None
    finished_at: float | None = None
    key_id: str | None = None


@dataclass(frozen=True, slots=True)
class Logged:
    """A command as a replay sees it: all but its body and its outcome."""

    seq_id: int
    request_id: str
    kind: str
    encoding: str
    inline: bool  # whether the body is in the row
    body_key: str | None
    arrived_at: float
    status: Status
    key_id: str | None
    loaded: str | None  # the id of the checkpoint that a load took
    attempts: int


_COLUMNS = [commands.c[name] for name in CommandRow.__dataclass_fields__]
_SELECT = sa.select(*_COLUMNS)
# What every request needs is built once: building a statement takes longer than carrying it out.
_TAKEN = sa.select(commands.c.request_id).where(
    commands.c.run_id == sa.bindparam("run"), commands.c.seq_id == sa.bindparam("seq")
)
_LOG = commands.insert()
_FINISH = (
    commands.update()
    .where(commands.c.request_id == sa.bindparam("request"), commands.c.status == "queued")
    .values(
        {
            name: sa.bindparam(f"new_{name}")
            for name in (
                "status", "result", "result_key", "result_type", "usage", "error", "category", "finished_at",
            )
        }
    )
    .returning(commands.c.kind)
)  # fmt: skip
_FETCHED = (
    commands.update()
    .where(commands.c.request_id == sa.bindparam("request"), commands.c.fetched_at.is_(None))
    .values(fetched_at=sa.bindparam("at"))
)


def add(connection: sa.Connection, row: CommandRow) -> str | None:
    """Log a command. Where its place in its run is taken, nothing changes and the request id of the
    one that took it comes back."""
    taken = connection.scalar(_TAKEN, {"run": row.run_id, "seq": row.seq_id})
    if taken is not None:
        return str(taken)
    connection.execute(_LOG, {name: getattr(row, name) for name in CommandRow.__dataclass_fields__})
    return None


def finish(
    connection: sa.Connection,
    request_id: str,
    *,
    now: float,
    result: bytes | None = None,
    result_key: str | None = None,
    result_type: ResultType | None = None,
    usage: Mapping[str, int] | None = None,
    error: str | None = None,
    category: str | None = None,
) -> str | None:
    """Write down what became of a command. Answers its kind; none where that was known already."""
    kind: str | None = connection.scalar(
        _FINISH,
        {
            "request": request_id,
            "new_status": "done" if error is None else "failed",
            "new_result": result,
            "new_result_key": result_key,
            "new_result_type": result_type,
            "new_usage": json.dumps(dict(usage)) if usage else None,
            "new_error": error,
            "new_category": category,
            "new_finished_at": now,
        },
    )
    return kind


def by_request(connection: sa.Connection, request_id: str, scope: Scope) -> CommandRow | None:
    query = _SELECT.where(scope.rows(commands), commands.c.request_id == request_id)
    row = connection.execute(query).one_or_none()
    return CommandRow(*row) if row is not None else None


def log_of_run(
    connection: sa.Connection, run_id: str, scope: Scope, since: int = 0, *, queued: bool = False
) -> list[Logged]:
    """A run's commands from seq_id `since` on, in order; with `queued` those alone that have no outcome."""
    c = commands.c
    query = (
        sa.select(
            c.seq_id, c.request_id, c.kind, c.encoding, c.body.is_not(None), c.body_key, c.arrived_at,
            c.status, c.key_id, c.loaded, c.attempts,
        )
        .where(scope.rows(commands), c.run_id == run_id, c.seq_id >= since)
        .order_by(c.seq_id)
    )  # fmt: skip
    if queued:
        query = query.where(c.status == "queued")
    return [Logged(*row) for row in connection.execute(query)]


def body(connection: sa.Connection, request_id: str) -> bytes | None:
    """The body that is in a command's row."""
    found: bytes | None = connection.scalar(
        sa.select(commands.c.body).where(commands.c.request_id == request_id)
    )
    return found


def is_settled(connection: sa.Connection, run_id: str, seq: int) -> bool:
    """Whether the outcomes of all of a run's commands up to `seq` are written down."""
    open_ = sa.select(commands.c.pk).where(
        commands.c.run_id == run_id, commands.c.seq_id <= seq, commands.c.status == "queued"
    )
    return connection.scalar(open_.limit(1)) is None


def set_loaded(connection: sa.Connection, request_id: str, checkpoint_id: str) -> None:
    """Write down which checkpoint a load takes, before it does."""
    connection.execute(
        commands.update().where(commands.c.request_id == request_id).values(loaded=checkpoint_id)
    )


def begin_again(connection: sa.Connection, request_id: str) -> None:
    """Count that a command, whose outcome a crash has cost, is begun again."""
    mine = commands.c.request_id == request_id
    connection.execute(commands.update().where(mine).values(attempts=commands.c.attempts + 1))


def runs_with_queued(connection: sa.Connection, scope: Scope) -> list[str]:
    query = sa.select(commands.c.run_id).where(scope.rows(commands), commands.c.status == "queued").distinct()
    return [str(run_id) for run_id in connection.scalars(query)]


def fetched(connection: sa.Connection, request_ids: Iterable[str], now: float) -> None:
    """Note that results were fetched. The hour that they are kept begins with the first time."""
    if rows := [{"request": request_id, "at": now} for request_id in request_ids]:
        connection.execute(_FETCHED, rows)


def drop_results(connection: sa.Connection, fetched_before: float, limit: int = 1000) -> list[str]:
    """Forget results that were fetched long ago. Answers the blobs that nothing refers to any more."""
    old = list(
        connection.execute(
            sa.select(commands.c.pk, commands.c.result_key)
            .where(commands.c.fetched_at < fetched_before, commands.c.result_type.is_not(None))
            .limit(limit)
        )
    )
    if old:
        connection.execute(
            commands.update()
            .where(commands.c.pk.in_([pk for pk, _ in old]))
            .values(result=None, result_key=None, result_type=None)
        )
    return [key for _, key in old if key is not None]


def drop_replayable_bodies(connection: sa.Connection, limit: int = 1000) -> list[str]:
    """Forget the bodies of commands that no replay needs. They changed nothing (they failed, or went
    forward alone); or are in a snapshot; or come before the last optimizer step that a training checkpoint
    without a TTL of their run contains (after it, gradients may have been accumulated that a checkpoint
    does not hold); or their session has finished. Answers the blobs, as above."""
    step = commands.alias("step")
    saved = (
        sa.select(sa.func.max(step.c.seq_id))
        .join(checkpoints, checkpoints.c.run_id == step.c.run_id)
        .where(
            step.c.run_id == commands.c.run_id,
            step.c.kind == "optim_step",
            step.c.status == "done",
            step.c.seq_id < checkpoints.c.seq_id,
            checkpoints.c.kind == "training",
            checkpoints.c.expires_at.is_(None),
        )
        .scalar_subquery()
    )
    written = sa.select(runs.c.snapshot_seq).where(runs.c.id == commands.c.run_id).scalar_subquery()
    finished = (
        sa.select(sessions.c.id)
        .join(runs, runs.c.session_id == sessions.c.id)
        .where(runs.c.id == commands.c.run_id, sessions.c.finished_at.is_not(None))
        .exists()
    )
    needless = (commands.c.status == "failed") | (commands.c.kind == "forward")
    old = list(
        connection.execute(
            sa.select(commands.c.pk, commands.c.body_key)
            .where(
                commands.c.body_key.is_not(None),
                commands.c.status != "queued",
                needless | (commands.c.seq_id < saved) | (commands.c.seq_id <= written) | finished,
            )
            .limit(limit)
        )
    )
    if old:
        connection.execute(
            commands.update().where(commands.c.pk.in_([pk for pk, _ in old])).values(body_key=None)
        )
    return [key for _, key in old]


def blob_keys(connection: sa.Connection) -> set[str]:
    """All blobs that the log refers to."""
    keys: set[str] = set()
    for column in (commands.c.body_key, commands.c.result_key):
        keys.update(str(key) for key in connection.scalars(sa.select(column).where(column.is_not(None))))
    return keys
