"""Bringing a run back from its log after a crash: from where, and which commands.

A run's state is the fold of its commands. A replay begins from the newest state that lies on the disk: a
snapshot, a training checkpoint of the run's own, or nothing at all, since the command that created the run
is in the log, too. Behind that come the logged commands in the order of their seq_ids. Those that were done
are done again for what they did to the state alone: their outcomes stand, and are neither written down nor
metered a second time. Those whose outcome is not in the log are carried out as if for the first time. Those
that failed have changed nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from tinsmith.store import Connection, checkpoints, commands, samplers
from tinsmith.store.commands import Logged, Status
from tinsmith.store.runs import RunRow
from tinsmith.store.scope import SERVER

from . import shelf
from .context import Context
from .errors import Refusal
from .futures import Result
from .recorder import Recorder
from .steps import CREATES

MOST_FALLS = 4  # deaths of the engine with the same step of a replay under way, after which there is no more

_SET = CREATES | {"optim_step", "load_weights"}  # what sets weights and moments, and drops gradients
_CHANGE = _SET | {"forward_backward"}


class Irreproducible(Refusal):
    """The log does not give the state back; the message says why."""


@dataclass(frozen=True, slots=True)
class Base:
    """A state on the disk, and the last command in it. Without a key: nothing, before all commands."""

    key: str | None
    seq_id: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run is brought back. `again` are the commands to be done again, `open` those without an outcome,
    by seq_id."""

    base: Base
    again: dict[int, Logged]
    open: dict[int, Logged]
    why_not: str | None = None  # it cannot be


@dataclass(slots=True)
class Progress:
    """How far a run's replay is. `again` are the seq_ids of what is done again, `falls` count the engine's
    deaths by the seq_id that was replayed then."""

    wanted: bool = False
    redoing: bool = False  # whether the last command that was handed over is done again
    left: int = 0
    again: frozenset[int] = frozenset()
    falls: Counter[int] = field(default_factory=Counter)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.ended.set()

    @property
    def under_way(self) -> bool:
        return not self.ended.is_set()

    def want(self) -> None:
        self.wanted = True
        self.ended.clear()

    def begin(self, again: Iterable[int]) -> None:
        self.wanted, self.redoing = False, False
        self.again = frozenset(again)
        self.left = len(self.again)
        if self.left:
            self.ended.clear()
        else:
            self.over()

    def advance(self, seq_id: int) -> None:
        self.falls.pop(seq_id, None)
        self.left -= 1
        if self.left <= 0:
            self.over()

    def over(self) -> None:
        self.wanted, self.left = False, 0
        self.ended.set()

    def __str__(self) -> str:
        if self.wanted:
            return "the run is being replayed after a crash"
        total = len(self.again)
        return f"the run is being replayed after a crash, {total - self.left} of {total} commands"


async def plan(context: Context, recorder: Recorder, row: RunRow, snapshot: Base | None) -> Plan:
    """Look into the log. To be called while no command of the run is under way."""
    since = snapshot.seq_id + 1 if snapshot is not None else 0

    def look(connection: Connection) -> tuple[list[Logged], list[Base], dict[int, str]]:
        log = commands.log_of_run(connection, row.id, SERVER, since)
        saved = [
            Base(each.folder, each.seq_id)
            for each in checkpoints.of_run(connection, row.id, SERVER, time.time())
            if each.kind == "training" and each.seq_id >= since
        ]
        unnamed = {
            each.seq_id: each.sampler or ""
            for each in samplers.published_by(connection, row.id, SERVER, since)
            if each.seq_id is not None and (each.folder is None or each.sampler != each.id)
        }
        return log, saved, unnamed

    log, saved, unnamed = await context.store.read(look)
    fates = {each.seq_id: _fate(recorder, each) for each in log}
    open_ = {each.seq_id: each for each in log if fates[each.seq_id] == "queued"}
    done = [each for each in log if fates[each.seq_id] == "done"]
    base = snapshot or Base(None, -1)
    for each in saved:
        # Weights and moments are those of the last command before it that set them. What was accumulated
        # behind that is not in a checkpoint, and is computed again.
        at = max((c.seq_id for c in done if c.kind in _SET and c.seq_id < each.seq_id), default=-1)
        if base.seq_id < at < min(open_, default=at + 1):
            base = Base(each.key, at)
    again = {
        each.seq_id: each
        for each in done
        if each.seq_id > base.seq_id and (each.kind in _CHANGE or each.seq_id in unnamed)
    }
    return Plan(base, again, open_, await _why_not(context, base, again, open_))


def _fate(recorder: Recorder, each: Logged) -> Status:
    """What became of a command. Where its outcome could not be written down, it is known in memory."""
    request = recorder.find(each.request_id) if each.status == "queued" else None
    if request is None or request.outcome is None:
        return each.status
    return "done" if isinstance(request.outcome, Result) else "failed"


async def _why_not(
    context: Context, base: Base, again: dict[int, Logged], open_: dict[int, Logged]
) -> str | None:
    if base.key is None and 0 not in again and 0 not in open_:
        return "the command that created it is not in the log"
    for each in again.values():
        if not each.inline and each.body_key is None:
            return f"the body of the request with seq_id {each.seq_id} is not kept any more"
        if each.kind in ("load_weights", "create_by_load") and each.loaded is None:
            return f"the log, which is of an earlier version, does not say what seq_id {each.seq_id} loaded"
    for each in (*again.values(), *open_.values()):
        if each.loaded is not None and not await context.store.read(
            partial(checkpoints.is_there, checkpoint_id=each.loaded)
        ):
            return f"the checkpoint that seq_id {each.seq_id} loaded is gone"
    keys = [base.key, *(each.body_key for each in again.values())]
    missing = await asyncio.to_thread(
        lambda: [key for key in keys if key is not None and not context.blobs.path(key).exists()]
    )
    return f"{missing[0]} is missing in the data folder" if missing else None


async def begin(context: Context, row: RunRow, base: Base) -> None:
    """Make the engine hold the state that a replay begins from. Raises Refusal, EngineLost."""
    shelf.check_base(context, row)
    if base.key is not None:
        await shelf.bring_back(context, row, base.key, base.seq_id)


async def remedy(context: Context, row: RunRow) -> str:
    """What to do about a run that is lost: its newest checkpoint."""
    newest = await context.store.read(
        lambda connection: checkpoints.newest(connection, row.id, "training", SERVER, time.time())
    )
    if newest is None:
        return "it has no checkpoint: create a new training client, and call save_state now and then"
    return (
        f"its newest checkpoint is {newest.path} (after seq_id {newest.seq_id}): go on from there with"
        f' create_training_client_from_state_with_optimizer("{newest.path}")'
    )
