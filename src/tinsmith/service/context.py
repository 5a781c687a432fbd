"""What every part of the service works with."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tinsmith.blobs import LocalBlobs
from tinsmith.engine.commands import EngineClient, ModelInfo
from tinsmith.settings import Settings
from tinsmith.store import Connection, Store, WriteFailed, checkpoints

from .errors import NotFound, Refused, Unwritable
from .limits import Limits
from .metering import Meter
from .prices import PriceTable
from .traces import Traces

log = logging.getLogger("tinsmith.service")

T = TypeVar("T")
_CONTEXT = re.compile(r"peft:([1-9][0-9]{0,11})")


@dataclass
class Context:
    settings: Settings
    store: Store
    blobs: LocalBlobs
    engine: EngineClient
    traces: Traces = field(init=False)
    meter: Meter = field(init=False)
    limits: Limits = field(init=False)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.traces = Traces(self.store)
        self.meter = Meter(self.store, PriceTable.read(self.settings.prices), self._active_parameters)
        self.limits = Limits(self.store, self.meter.spent)

    def _active_parameters(self, name: str) -> int | None:
        models = self.engine.info.models
        info = models.get(name) or models.get(name.partition(":")[0])
        return info.active_parameters if info is not None else None

    def model(self, name: str) -> ModelInfo:
        """The served base model called `name`. With a suffix, `NAME:peft:4096`, its context has to hold that
        many tokens."""
        models = self.engine.info.models
        plain, _, suffix = name.partition(":")
        info = models.get(name) or models.get(plain)
        if info is None:
            raise NotFound(f"base_model: {name[:200]!r} is not served here; served are: {', '.join(models)}")
        if name not in models:
            wanted = _CONTEXT.fullmatch(suffix)
            if wanted is None:
                raise Refused(f"base_model: {name[:200]!r} must be {plain} or {plain}:peft:TOKENS")
            if int(wanted[1]) > info.max_context:
                raise Refused(
                    f"base_model: {name[:200]!r} asks for a context of {wanted[1]} tokens; {plain} has"
                    f" {info.max_context} here"
                )
        return info

    async def write(self, work: Callable[[Connection], T]) -> T:
        """`store.write` for what a caller asked for. Raises Unwritable where the disk takes no more."""
        try:
            return await self.store.write(work)
        except WriteFailed as error:
            raise Unwritable(error) from error

    async def drop_files(self, folder: str) -> None:
        """Delete the files of a checkpoint that is gone, unless a copy of it shares them."""
        if not await self.store.read(lambda connection: checkpoints.shares_folder(connection, folder)):
            await asyncio.to_thread(self.blobs.delete, folder)

    def spawn(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[Any]:
        """Run `work` beside everything else; a request that started it may go away meanwhile."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a background task failed", exc_info=error)

    async def quiesce(self, seconds: float) -> None:
        """Wait until nothing runs in the background any more."""
        current = asyncio.current_task()
        deadline = asyncio.get_running_loop().time() + seconds
        while waiting := {task for task in self._tasks if task is not current}:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                break
            await asyncio.wait(waiting, timeout=left)
