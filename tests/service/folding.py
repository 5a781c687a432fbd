"""A service around an engine whose states are words, which can die between any two steps of anything."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tinsmith.blobs import LocalBlobs
from tinsmith.engine import commands as c
from tinsmith.service.caller import Caller
from tinsmith.service.key_administration import first_key
from tinsmith.service.replay import MOST_FALLS
from tinsmith.service.service import Service
from tinsmith.settings import Settings
from tinsmith.store import Store

MODEL = c.ModelInfo("m", "", "", "", 256, 512, 64, "fp32", 1, "f" * 16, True, "packed")
SECRET = "tml-secret-of-the-tests"


def word(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


class WordEngine:
    """EngineClient: a run is (weights, moments, gradient), each of them a word of all that made it."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.info = c.EngineInfo("cpu", True, {"torch": "1"}, {"m": MODEL})
        self.generation, self.ready = 1, True
        self.dying = False  # for good: what comes is lost at once
        self.carried_out: list[tuple[str, int]] = []  # what changed a state, in order
        self._forget()
        self._callbacks: list[Callable[[int], None]] = []
        self._worker: asyncio.Task[None] | None = None
        self._held: list[tuple[c.Command, asyncio.Future[c.Reply]]] = []

    def _forget(self) -> None:
        self.runs: dict[str, tuple[str, str, str]] = {}
        self.samplers: dict[str, str] = {}
        self._queues: dict[str, deque[tuple[c.Command, asyncio.Future[c.Reply]]]] = {}
        self._pending: set[asyncio.Future[c.Reply]] = set()

    async def given_up(self) -> None:
        await asyncio.Event().wait()

    async def start(self) -> c.EngineInfo:
        self._worker = asyncio.get_running_loop().create_task(self._work())
        return self.info

    async def stop(self, grace: float) -> None:
        self.dying = True

    def on_lost(self, callback: Callable[[int], None]) -> None:
        self._callbacks.append(callback)

    def submit(self, command: c.Command, parts: object = None) -> Awaitable[c.Reply]:
        future: asyncio.Future[c.Reply] = asyncio.get_running_loop().create_future()
        if self.dying:
            future.set_exception(c.EngineLost("stopped"))
        elif not self.ready:
            self._held.append((command, future))
        else:
            self._enqueue(command, future)
        return future

    def _enqueue(self, command: c.Command, future: asyncio.Future[c.Reply]) -> None:
        self._pending.add(future)
        if isinstance(command, c.ForwardBackward) and b"wrong" in command.body:
            self._answer(future, c.Failed("the body is wrong"))  # before those in front of it
            return
        self._queues.setdefault(getattr(command, "run", ""), deque()).append((command, future))

    def _answer(self, future: asyncio.Future[c.Reply], reply: c.Reply) -> None:
        self._pending.discard(future)
        if not future.done():
            future.set_result(reply)

    def die(self) -> None:
        """All that was not answered is lost, and so is all that was held."""
        self.ready = False
        pending = self._pending
        self._forget()
        for future in pending:
            if not future.done():
                future.set_exception(c.EngineLost("died"))
                future.exception()
        for callback in self._callbacks:
            callback(self.generation)

    def end(self) -> None:
        """For good: nothing is answered any more."""
        self.dying = True
        self._forget()

    def revive(self) -> None:
        if self.ready:
            return
        self.ready = True
        self.generation += 1
        held, self._held = self._held, []
        for each in held:
            self._enqueue(*each)

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(0 if self.random.random() < 0.7 else 0.001)
            names = [name for name, queue in self._queues.items() if queue]
            if not names or not self.ready:
                await asyncio.sleep(0.0005)
                continue
            command, future = self._queues[self.random.choice(names)].popleft()
            if isinstance(command, c.ForwardBackward) and b"deadly" in command.body:
                self.die()
                asyncio.get_running_loop().call_later(0.002, self.revive)
                continue
            try:
                reply: c.Reply = self._carry_out(command)
            except Exception as error:
                reply = c.Failed(f"{type(error).__name__}: {error}", "server")
            self._answer(future, reply)

    def _carry_out(self, command: c.Command) -> c.Reply:
        times = {"started": time.time() - 0.01}
        match command:
            case c.CreateAdapter():
                if command.run in self.runs:
                    return c.Failed(f"run {command.run} exists already", "server")
                self.runs[command.run] = (word("new", command.lora.seed, command.optimizer), "", "")
                return c.Done({}, times=times)
            case c.OpenSampler():
                self.samplers.setdefault(command.sampler, self._read(command.path)[0])
                return c.Done({})
            case c.PutSampler():
                Path(command.path).write_text(json.dumps([self.samplers[command.sampler], "", ""]))
                return c.Done({"written": True})
            case c.ReleaseSampler():
                self.samplers.pop(command.sampler, None)
                return c.Done({})
            case c.Sample():
                weights = self.samplers[command.sampler] if command.sampler is not None else "base"
                return c.Done(word(weights, command.prompt, command.params.seed).encode(), {"sample": 1})
            case c.ReleaseRun():
                self.runs.pop(command.run, None)
                return c.Done({})
            case c.GetStatus() | c.Cancel() | c.CreateLoss() | c.ImportAdapter():
                return c.Done({})
        weights, moments, gradient = self.runs[command.run]
        match command:
            case c.ForwardBackward():
                if b"forward-only" not in command.body:
                    gradient = word(gradient, weights, command.body)
                    self.runs[command.run] = weights, moments, gradient
                    self.carried_out.append((command.run, command.seq_id))
                # A long result is written into a file before its row is: rows are committed in another order.
                answer = word(weights, command.body) * (10_000 if len(command.body) > 50_000 else 1)
                return c.Done(answer.encode(), {"train": len(command.body)}, times)
            case c.OptimStep():
                metrics = {"norm": gradient}
                if gradient:
                    weights, moments = (
                        word(weights, moments, gradient, command.params),
                        word(moments, gradient),
                    )
                    self.runs[command.run] = weights, moments, ""
                    self.carried_out.append((command.run, command.seq_id))
                return c.Done({"metrics": metrics}, times=times)
            case c.SaveState():
                self._write(command.path, weights, moments, gradient if command.gradients else "")
                return c.Done({"size_bytes": 1}, times=times)
            case c.SaveExternal():
                self._write(command.path, weights, "", "")
                return c.Done({"size_bytes": 1}, times=times)
            case c.LoadState():
                found = self._read(command.path)
                self.runs[command.run] = (
                    found[0],
                    found[1] if command.optimizer else "",
                    found[2] if command.gradients else "",
                )
                self.carried_out.append((command.run, command.seq_id))
                return c.Done({}, times=times)
            case c.Publish():
                if command.path is not None:
                    self._write(command.path, weights, "", "")
                self.samplers[command.sampler] = weights
                return c.Done({"size_bytes": 1 if command.path else None}, times=times)
        raise AssertionError(command)

    @staticmethod
    def _write(path: str, *state: str) -> None:
        if Path(path).exists():
            raise FileExistsError(path)
        part = Path(path).with_name(f".{uuid.uuid4().hex}")
        part.mkdir(parents=True)
        (part / "state").write_text(json.dumps(state))
        part.rename(path)

    @staticmethod
    def _read(path: str) -> list[str]:
        file = Path(path)
        return list(json.loads((file / "state" if file.is_dir() else file).read_text()))


class Life:
    """One life of the service on a data folder."""

    def __init__(self, data: Path, seed: int = 0, **settings: Any) -> None:
        data.mkdir(parents=True, exist_ok=True)
        self.engine = WordEngine(seed)
        self.store = Store.open(Store.local_url(data))
        first_key(self.store, SECRET)
        made = Settings(data=data, poll_hold=5.0, **{"snapshot_every": 0.0, **settings})
        self.service = Service(made, self.store, LocalBlobs(data / "blobs"), self.engine)  # type: ignore[arg-type]
        self.caller: Caller

    async def start(self) -> Life:
        await self.service.start()
        self.caller = await self.service.keys.authenticate(SECRET)
        return self

    @property
    def is_at_its_limit(self) -> bool:
        """Whether the engine has died as often of the same command as one may."""
        runs = self.service.runs
        falls = [max(run._replay.falls.values(), default=0) for run in runs._runs.values()]
        return runs._company._alone or max(falls, default=0) >= MOST_FALLS - 1

    async def stop(self) -> None:
        await self.service.stop(5.0)
        self.store.close()

    def kill(self, random_: random.Random) -> None:
        """As kill -9: what has not been written by now may be or not."""
        self.engine.end()
        jobs = self.store._jobs
        if random_.random() < 0.5:
            with contextlib.suppress(Exception):
                while jobs.get_nowait() is not None:
                    pass
        self.store.close()


def live(work: Callable[[], Awaitable[Any]]) -> Any:
    """Run `work` on a loop of its own; what else goes on there ends as in a crash."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _loop, _context: None)
    try:
        return loop.run_until_complete(work())
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
