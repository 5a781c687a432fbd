"""What each kind of logged command asks of the engine, and what its sender is answered.

A step is made when the command's turn has come, from nothing but the logged body and what earlier
commands of the run have left behind: everything random was drawn before it was logged.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from tinsmith.engine.commands import (
    Command,
    CreateAdapter,
    Done,
    ForwardBackward,
    LoadState,
    LoraSpec,
    OptimStep,
    Publish,
    SaveExternal,
    SaveState,
    Share,
)
from tinsmith.store import Connection, checkpoints, ledger, runs, samplers
from tinsmith.store.checkpoints import CheckpointRow, Replaced
from tinsmith.store.runs import RunRow
from tinsmith.store.samplers import SamplingSessionRow
from tinsmith.store.scope import SERVER, Scope
from tinsmith.wire.optimizers import Family, from_log
from tinsmith.wire.paths import CheckpointKind, TinkerPath

from .aside import aside_key
from .audit import Actor, about_checkpoint, record, record_reads
from .context import Context
from .errors import Refusal
from .limits import Who

Kind = Literal[
    "create_model", "create_by_load", "load_weights", "forward_backward", "forward",
    "optim_step", "save_weights", "save_weights_for_sampler", "save_weights_external",
]  # fmt: skip

CREATES: frozenset[str] = frozenset({"create_model", "create_by_load"})

Payload = bytes | dict[str, object]


@dataclass(slots=True)
class Step:
    """Engine commands, submitted one behind the other; the answer is made from the last one's.

    `commit` is written in the transaction that records the answer, and `then` runs after it.
    `undo` runs if it was not done after all; once it has, the command can be begun anew. A step with `commit`
    is answered when that is durable.
    """

    commands: tuple[Command, ...]
    answer: Callable[[Done], Payload]
    commit: Callable[[Connection, Done], object] | None = None
    then: Callable[[object], None] | None = None
    undo: Callable[[], Awaitable[None]] | None = None
    loads: str | None = None  # the id of the checkpoint that is loaded


@dataclass(slots=True)
class Saves:
    """The names that a run is saving under at this moment: the second save of one waits for the first."""

    under_way: dict[tuple[CheckpointKind, str], asyncio.Event] = field(default_factory=dict)

    async def claim(self, kind: CheckpointKind, name: str) -> Callable[[], None]:
        while (other := self.under_way.get((kind, name))) is not None:
            await other.wait()
        mine = self.under_way[kind, name] = asyncio.Event()

        def release() -> None:
            self.under_way.pop((kind, name), None)
            mine.set()

        return release

    async def settled(self, path: TinkerPath) -> None:
        """Wait for a save under `path` that is not done yet."""
        while (other := self.under_way.get((path.kind, path.name))) is not None:
            await other.wait()


class Samplers(Protocol):
    """Who is told of what the engine holds to sample from. `revivable` says whether the replay of a run
    publishes weights without a name once more; `revive` waits for that."""

    revivable: Callable[[SamplingSessionRow], Awaitable[bool]] | None
    revive: Callable[[SamplingSessionRow], Awaitable[None]] | None

    def published(self, sampler: str) -> None:
        """The engine holds it from now on."""

    def forget_checkpoint(self, checkpoint_id: str) -> None:
        """That checkpoint is gone."""


@dataclass(slots=True)
class StepMaker:
    """Makes the steps of one run."""

    context: Context
    run: RunRow
    saves: Saves
    samplers: Samplers

    async def make(
        self,
        kind: str,
        seq_id: int,
        body: bytes,
        encoding: str,
        arrived_at: float,
        loaded: str | None = None,
        *,
        again: bool = False,
    ) -> Step:
        """`loaded`: the id of the checkpoint that a load took when it was first begun. With `again` the
        command was done before, and is asked of the engine for what it did there alone. Raises Refusal."""
        if kind in ("forward_backward", "forward"):
            command = ForwardBackward(
                self.run.id,
                seq_id,
                body,
                cast(Literal["identity", "zstd"], encoding),
                aside=str(self.context.blobs.path(aside_key(self.run.session_id))),
                arrived_at=arrived_at,
                share=self._share,
            )
            return Step((command,), answer=lambda done: done.payload)
        values = json.loads(body)
        if kind == "optim_step":
            return Step((OptimStep(self.run.id, seq_id, from_log(values)),), answer=_metrics)
        if kind == "create_model":
            return self._create(values)
        if kind == "create_by_load":
            return await self._create_by_load(seq_id, values, loaded)
        if kind == "load_weights":
            return await self._load(seq_id, values, loaded)
        if kind == "save_weights":
            return await self._save(seq_id, values)
        if kind == "save_weights_for_sampler" and again:
            return self._publish_again(seq_id, values)
        if kind == "save_weights_for_sampler":
            return await self._publish(seq_id, values)
        if kind == "save_weights_external":
            return await self._save_external(seq_id, values)
        raise Refusal(f"this server does not know commands of the kind {kind!r}")

    @property
    def _share(self) -> Share:
        return self.context.limits.share(self.run.org_id)

    def _adapter(self, lora: LoraSpec) -> CreateAdapter:
        run = self.run
        return CreateAdapter(run.id, run.base_model, lora, optimizer=run.optimizer, share=self._share)

    def _create(self, values: dict[str, Any]) -> Step:
        lora = LoraSpec(**values["lora"])
        return Step(
            (self._adapter(lora),),
            answer=lambda _: {"type": "create_model", "model_id": self.run.id},
            commit=lambda connection, _: runs.set_state(connection, self.run.id, "live"),
        )

    async def _create_by_load(self, seq_id: int, values: dict[str, Any], loaded: str | None) -> Step:
        load = await self._load(seq_id, values, loaded)
        create = self._adapter(LoraSpec(**values["lora"]))
        load.commands = (create, *load.commands)
        noted = load.commit
        assert noted is not None

        def commit(connection: Connection, done: Done) -> None:
            runs.set_state(connection, self.run.id, "live")
            noted(connection, done)

        load.commit = commit
        return load

    async def _load(self, seq_id: int, values: dict[str, Any], loaded: str | None) -> Step:
        path = TinkerPath.parse(values["path"])
        if path.run == self.run.id:
            await self.saves.settled(path)
        if loaded is not None:  # whatever the path means by now
            checkpoint, source = await get_checkpoint(self.context, path, loaded)
        else:
            checkpoint, source = await find_checkpoint(self.context, path, scope_of(values))
        if values["optimizer"] and checkpoint.kind != "training":
            raise Refusal(
                f"optimizer: {path} has weights alone, and no optimizer state; load it without, or load a"
                " checkpoint of save_state()"
            )
        check_base(source, self.run)
        if source.lora_shape != lora_shape(self.run.lora):
            raise Refusal(
                f"path: {path} has LoRA {source.lora_shape}, but this run has {lora_shape(self.run.lora)};"
                " create a training client from that checkpoint instead"
            )
        folder = self.context.blobs.path(checkpoint.folder)
        return Step(
            (LoadState(self.run.id, seq_id, str(folder), optimizer=values["optimizer"]),),
            answer=lambda _: {"type": "load_weights", "path": str(path), "model_id": self.run.id},
            commit=lambda connection, _: record_reads(
                connection, values.get("read_by", ()), path, "training"
            ),
            loads=checkpoint.id,
        )

    async def _save(self, seq_id: int, values: dict[str, Any]) -> Step:
        release = await self._claim("training", values["name"], values["overwrite"])
        row, folder = self._checkpoint("training", seq_id, values)
        return Step(
            (SaveState(self.run.id, seq_id, str(folder)),),
            answer=lambda _: {"type": "save_weights", "path": str(row.path)},
            commit=self._add(row, values),
            then=lambda replaced: self._saved(release, replaced),
            undo=lambda: self._not_saved(release, row.folder),
        )

    async def _save_external(self, seq_id: int, values: dict[str, Any]) -> Step:
        release = await self._claim("external", values["name"], values["overwrite"])
        row, folder = self._checkpoint("external", seq_id, values)
        return Step(
            (SaveExternal(self.run.id, seq_id, str(folder), tuple(values["recipients"])),),
            answer=lambda done: {
                "type": "save_weights_external",
                "path": str(row.path),
                "size_bytes": _sized(row, done).size_bytes,
            },
            commit=self._add(row, values),
            then=lambda replaced: self._saved(release, replaced),
            undo=lambda: self._not_saved(release, row.folder),
        )

    async def _publish(self, seq_id: int, values: dict[str, Any]) -> Step:
        if values["name"] is None:
            return await self._publish_ephemeral(seq_id, values)
        release = await self._claim("sampler", values["name"], values["overwrite"])
        row, folder = self._checkpoint("sampler", seq_id, values)
        sampler = sampler_of(row.id)

        def saved(replaced: object) -> None:
            self.samplers.published(sampler)
            self._saved(release, replaced)

        return Step(
            (Publish(self.run.id, seq_id, sampler, str(folder)),),
            answer=lambda _: {"type": "save_weights_for_sampler", "path": str(row.path)},
            commit=self._add(row, values),
            then=saved,
            undo=lambda: self._not_saved(release, row.folder),
        )

    def _unnamed(self, values: dict[str, Any]) -> str:
        """What the engine knows weights without a name by. To it all inflight samplers of a run are one: a
        new save replaces the weights of all."""
        return f"inflight-{self.run.id}" if values.get("inflight") else str(values["sampling_session_id"])

    def _publish_again(self, seq_id: int, values: dict[str, Any]) -> Step:
        sampler = self._unnamed(values)
        return Step(
            (Publish(self.run.id, seq_id, sampler),),
            answer=lambda _: {},
            then=lambda _: self.samplers.published(sampler),
        )

    async def _publish_ephemeral(self, seq_id: int, values: dict[str, Any]) -> Step:
        sampler = self._unnamed(values)
        row = SamplingSessionRow(
            id=values["sampling_session_id"],
            org_id=self.run.org_id,
            session_id=self.run.session_id,
            created_at=values["created_at"],
            base_model=self.run.base_model,
            model_path=None,
            sampler=sampler,
            folder=None,
            ephemeral=True,
            run_id=self.run.id,
            seq_id=seq_id,
        )
        if (
            await self.context.store.read(lambda connection: samplers.get(connection, row.id, SERVER))
            is not None
        ):
            raise Refusal(f"sampling_session_seq_id: there is a sampling session {row.id} already")
        return Step(
            (Publish(self.run.id, seq_id, sampler),),
            answer=lambda _: {"type": "save_weights_for_sampler", "sampling_session_id": row.id},
            commit=lambda connection, _: samplers.add(connection, row),
            then=lambda _: self.samplers.published(sampler),
        )

    async def _claim(self, kind: CheckpointKind, name: str, overwrite: bool) -> Callable[[], None]:
        await self._check_storage()
        release = await self.saves.claim(kind, name)
        try:
            path = TinkerPath(self.run.id, kind, name)
            known = await self.context.store.read(
                lambda connection: checkpoints.find(connection, path, SERVER, time.time())
            )
            if known is not None and not overwrite:
                raise Refusal(
                    f"path: {path} exists already, and checkpoints never change;"
                    + (" choose another name, or save with overwrite=True" if kind == "training" else
                       " choose another name")
                )  # fmt: skip
        except BaseException:
            release()
            raise
        return release

    async def _check_storage(self) -> None:
        """Raises Refusal where the organization or the project stores as much as it may."""
        row, now = self.run, time.time()
        who = Who(row.org_id, row.project_id, row.session_id, row.user_id, "")
        if not self.context.limits.limits_storage(who):
            return
        scope = Scope(row.org_id, row.user_id, None)
        stored = await self.context.store.read(lambda connection: ledger.stored(connection, scope, now))
        if (reached := self.context.limits.over_storage(who, stored)) is not None:
            raise Refusal(f"path: nothing more can be saved: {reached}")

    def _checkpoint(
        self, kind: CheckpointKind, seq_id: int, values: dict[str, Any]
    ) -> tuple[CheckpointRow, Path]:
        folder = f"checkpoints/{values['checkpoint']}"
        row = CheckpointRow(
            id=values["checkpoint"],
            org_id=self.run.org_id,
            run_id=self.run.id,
            kind=kind,
            name=values["name"],
            seq_id=seq_id,
            folder=folder,
            size_bytes=None,
            created_at=values["created_at"],
            expires_at=values["expires_at"],
            user_metadata=values["user_metadata"],
        )
        return row, self.context.blobs.path(folder)

    def _add(
        self, row: CheckpointRow, values: dict[str, Any]
    ) -> Callable[[Connection, Done], Replaced | None]:
        """Adds a checkpoint once it is written; answers which one it replaces."""

        def commit(connection: Connection, done: Done) -> Replaced | None:
            replaced = checkpoints.add(connection, _sized(row, done))
            if replaced is not None and values.get("by") is not None:
                actor, about = Actor.from_json(values["by"]), about_checkpoint(row.path)
                record(connection, actor, row.org_id, "checkpoint", "overwrite", about)
            return replaced

        return commit

    def _saved(self, release: Callable[[], None], replaced: object) -> None:
        release()
        if isinstance(replaced, Replaced):
            self.samplers.forget_checkpoint(replaced.id)
            self.context.spawn(self.context.drop_files(replaced.folder))

    async def _not_saved(self, release: Callable[[], None], folder: str) -> None:
        release()
        await asyncio.to_thread(self.context.blobs.delete, folder)


@dataclass(frozen=True, slots=True)
class Source:
    """What a checkpoint was made of, and where."""

    project_id: str
    base_model: str
    fingerprint: str
    lora: dict[str, object]
    optimizer: Family

    @property
    def lora_shape(self) -> str:
        return lora_shape(self.lora)


async def find_checkpoint(
    context: Context, path: TinkerPath, scope: Scope, *, own: bool = False
) -> tuple[CheckpointRow, Source]:
    """A checkpoint within `scope`, and what it was made of; unless `own`, also what others have
    published. Any other one is not found."""

    def look(connection: Connection) -> tuple[CheckpointRow, Source] | None:
        row = checkpoints.find(connection, path, scope, time.time(), published=not own)
        run = runs.get(connection, row.run_id, SERVER) if row is not None else None
        if row is None or run is None:
            return None
        return row, _source(run)

    found = await context.store.read(look)
    if found is None:
        raise Refusal(f"path: there is no checkpoint {path}; `tinker checkpoint list` shows yours")
    return found


async def get_checkpoint(
    context: Context, path: TinkerPath, checkpoint_id: str
) -> tuple[CheckpointRow, Source]:
    """The checkpoint that a load took, which was allowed to it then. Raises Refusal if it is gone."""

    def look(connection: Connection) -> tuple[CheckpointRow, Source] | None:
        row = checkpoints.get(connection, checkpoint_id, SERVER, 0.0)
        run = runs.get(connection, row.run_id, SERVER) if row is not None else None
        return (row, _source(run)) if row is not None and run is not None else None

    found = await context.store.read(look)
    if found is None:
        raise Refusal(f"path: the checkpoint {path}, which was loaded here, is gone")
    return found


def _source(run: RunRow) -> Source:
    return Source(run.project_id, run.base_model, run.fingerprint, run.lora, run.optimizer)


def scope_of(values: dict[str, Any]) -> Scope:
    """What the sender of a logged load may read. Earlier versions logged its organization alone."""
    if "reader" in values:
        return Scope.from_json(values["reader"])
    return Scope(str(values["org_id"]), "", None)


def check_base(source: Source, run: RunRow) -> None:
    """A checkpoint fits the base model that it was trained on, and no other one of the same name."""
    if source.fingerprint != run.fingerprint:
        raise Refusal(
            f"path: this checkpoint was trained on another base model ({source.base_model},"
            f" {source.fingerprint[:12]}) than the one that is served as {run.base_model}"
            f" ({run.fingerprint[:12]}); serve the model that it was trained on"
        )


def lora_shape(lora: dict[str, object]) -> str:
    """What must be the same for weights to fit an adapter."""
    parts = [name for name in ("attn", "mlp", "unembed") if lora.get(f"train_{name}")]
    return f"rank {lora.get('rank')} on {', '.join(parts)}"


def sampler_of(checkpoint_id: str) -> str:
    """What the engine knows a checkpoint's weights by, once they are opened."""
    return f"checkpoint-{checkpoint_id}"


def _metrics(done: Done) -> Payload:
    return done.payload if isinstance(done.payload, dict) else {"metrics": {}}


def _sized(row: CheckpointRow, done: Done) -> CheckpointRow:
    size = done.payload.get("size_bytes") if isinstance(done.payload, dict) else None
    return replace(row, size_bytes=size if isinstance(size, int) else None)
