"""Putting a run's whole state into a snapshot, and bringing it back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid

from tinsmith.engine.commands import (
    CreateAdapter,
    EngineLost,
    Failed,
    LoadState,
    LoraSpec,
    ReleaseRun,
    SaveState,
)
from tinsmith.store import Connection, commands, runs
from tinsmith.store.runs import RunRow

from .context import Context
from .errors import Refusal

log = logging.getLogger("tinsmith.service.shelf")


def new_snapshot(context: Context, row: RunRow, seq_id: int) -> tuple[str, SaveState]:
    """The key of a new snapshot, and the command that writes it."""
    key = f"snapshots/{uuid.uuid4().hex}"
    return key, SaveState(row.id, seq_id, str(context.blobs.path(key)), gradients=True)


async def put_away(context: Context, row: RunRow, seq_id: int) -> str | None:
    """The snapshot's key, once it is on the disk and the engine's memory is free. None if it cannot be
    made, and the run stays where it is. Raises EngineLost."""
    key, command = new_snapshot(context, row, seq_id)
    reply = await context.engine.submit(command)
    if isinstance(reply, Failed):
        log.error("run %s stays in memory: %s", row.id, reply.message)
        return None
    if not await note(context, row, key, seq_id):
        log.error("run %s stays in memory: the results of its requests could not be logged", row.id)
        await asyncio.to_thread(context.blobs.delete, key)
        return None
    await release(context, row)  # before the run can be created anew
    log.info("run %s put away after seq_id %d", row.id, seq_id)
    return key


async def bring_back(context: Context, row: RunRow, key: str, seq_id: int) -> None:
    """Make the engine hold the run as it was after `seq_id`, from a snapshot or a training checkpoint. Raises
    Refusal, EngineLost."""
    check_base(context, row)
    lora = LoraSpec(**row.lora)  # type: ignore[arg-type]
    path = str(context.blobs.path(key))
    replies = [
        context.engine.submit(
            CreateAdapter(
                row.id,
                row.base_model,
                lora,
                optimizer=row.optimizer,
                share=context.limits.share(row.org_id),
            )
        ),
        context.engine.submit(LoadState(row.id, seq_id, path, optimizer=True, gradients=True)),
    ]
    answers = [await reply for reply in replies]
    for answer in answers:
        if isinstance(answer, Failed):
            await release(context, row)
            raise Refusal(f"this training run could not be brought back: {answer.message}")
    log.info("run %s brought back after seq_id %d", row.id, seq_id)


async def note(context: Context, row: RunRow, key: str, seq_id: int) -> bool:
    """Write down where a run's state lies, and up to which command; an earlier snapshot goes. False where the
    outcome of one of those commands is not in the log: a replay would have to go further back for it."""

    def write(connection: Connection) -> tuple[bool, str | None]:
        if not commands.is_settled(connection, row.id, seq_id):
            return False, None
        return True, runs.set_snapshot(connection, row.id, key, seq_id)

    kept, earlier = await context.store.write(write)
    if earlier is not None:
        await asyncio.to_thread(context.blobs.delete, earlier)
    return kept


async def release(context: Context, row: RunRow) -> None:
    """Free what the engine holds of a run."""
    with contextlib.suppress(EngineLost):
        await context.engine.submit(ReleaseRun(row.id))


def check_base(context: Context, row: RunRow) -> None:
    """A run goes on with the base model that it began with, or not at all. Raises Refusal."""
    model = context.engine.info.models.get(row.base_model)
    if model is None:
        raise Refusal(
            f"the base model of this training run, {row.base_model}, is not served any more;"
            " start the server with it"
        )
    if model.fingerprint != row.fingerprint or model.dtype != row.dtype:
        raise Refusal(
            f"what is served as {row.base_model} ({model.fingerprint[:12]}, {model.dtype}) is not the base"
            f" model that this training run began with ({row.fingerprint[:12]}, {row.dtype}); start the"
            " server with that one"
        )
