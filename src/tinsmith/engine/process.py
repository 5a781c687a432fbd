"""An engine in a child process, and the client that speaks to it.

A long kernel never stalls the parent's event loop, and a crash of one never takes the other down. They
speak frames over a socket pair: eight bytes of length and a pickle, between a parent and its own child
alone. The child ends when the parent does. This module imports no torch until it runs as the child.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import functools
import gc
import importlib
import logging
import math
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tinsmith import logs
from tinsmith.engine.commands import Command, EngineConfig, EngineInfo, EngineLost, Piece, Reply
from tinsmith.engine.postponed import postpone_compiler

log = logging.getLogger(__name__)

_LENGTH = struct.Struct("<Q")
_ENGINE = "tinsmith.engine.engine:Engine"
_LOGS = "_TINSMITH_ENGINE_LOGS"  # how the child logs: LEVEL:FORMAT
_DEATHS, _WINDOW = 5, 60.0  # so many deaths in so many seconds, and it is not started again
_INTAKE = 0.05  # seconds of taking commands between two steps
_BACKOFF = 0.25  # seconds before the second start in a row, and twice as many before each further one


def surroundings(environment: Mapping[str, str]) -> dict[str, str]:
    """Settings of a process that computes, beside those that the user has made, which win.

    It allocates and frees the same large tensors over and over: as it comes, glibc gives their memory back
    each time and takes it anew, page by page, which is a tenth of a training step. And where something else
    runs on one of its cores, threads that spin at every barrier wait for it a thousand times a second.
    """
    names = ("mmap_threshold", "trim_threshold")
    keep = ":".join(["glibc.malloc.hugetlb=1", *(f"glibc.malloc.{name}={1 << 32}" for name in names)])
    own = environment.get("GLIBC_TUNABLES")
    found = {"GLIBC_TUNABLES": f"{keep}:{own}" if own else keep}
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        found["GOMP_SPINCOUNT"] = "1000"
    return found


class EngineStartError(Exception):
    """The engine could not start; the message says why."""


class ProcessEngine:
    """EngineClient to a child process, which is started again when it dies."""

    def __init__(self, config: EngineConfig, *, factory: str = _ENGINE) -> None:
        """`factory` is the "module:name" of what the child drives; tests put a smaller one in its place."""
        self._config = config
        self._factory = factory
        self._info: EngineInfo | None = None
        self._generation = 0
        self._ready = False
        self._stopping = False
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._watch: asyncio.Task[None] | None = None
        self._pending: dict[int, asyncio.Future[Reply]] = {}
        self._parts: dict[int, Callable[[Piece], None]] = {}  # who hears of what comes before a reply
        self._held: list[tuple[int, Command]] = []  # submitted while no engine was there
        self._given_up = asyncio.Event()
        self._next = 0
        self._callbacks: list[Callable[[int], None]] = []
        self._deaths: list[float] = []

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise RuntimeError("the engine has not been started")
        return self._info

    @property
    def generation(self) -> int:
        return self._generation

    @property
    def ready(self) -> bool:
        return self._ready

    async def given_up(self) -> None:
        await self._given_up.wait()

    @property
    def pid(self) -> int | None:
        """The child's process id while there is one."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> EngineInfo:
        """Start the child and wait until it can work. Raises EngineStartError."""
        reader = await self._spawn()
        self._watch = asyncio.create_task(self._live(reader))
        return self.info

    def submit(self, command: Command, parts: Callable[[Piece], None] | None = None) -> Awaitable[Reply]:
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        if self._given_up.is_set() or self._stopping:
            future.set_exception(EngineLost("the engine is not running"))
            return future
        self._next += 1
        self._pending[self._next] = future
        if parts is not None:
            self._parts[self._next] = parts
        if self._ready and self._writer is not None:
            self._send(self._next, command)
        else:
            self._held.append((self._next, command))
        return future

    def on_lost(self, callback: Callable[[int], None]) -> None:
        self._callbacks.append(callback)

    async def stop(self, grace: float) -> None:
        """Let submitted work finish for up to `grace` seconds, then end the child, kindly and then not."""
        self._stopping = True
        if self._ready and self._writer is not None:
            self._writer.write(_frame(None))
        else:
            # A child that is only starting has nothing to finish, and no other is to be started now.
            grace = 0.0
            await self._end_watch(0.0)
        process = self._process
        if process is not None:
            for patience, action in ((grace, process.terminate), (2.0, process.kill), (10.0, None)):
                if await self._ended(process, patience) or action is None:
                    break
                action()
        await self._end_watch(5.0)  # the last replies may still be on their way through the socket
        if self._writer is not None:
            self._writer.close()
        self._ready = False
        self._lose("the engine has been stopped")

    async def _end_watch(self, patience: float) -> None:
        if self._watch is not None and not self._watch.done():
            await asyncio.wait({self._watch}, timeout=patience)
            self._watch.cancel()
            await asyncio.wait({self._watch})

    @staticmethod
    async def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
        def wait() -> bool:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                return False
            return True

        return await asyncio.to_thread(wait)

    async def _spawn(self) -> asyncio.StreamReader:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "tinsmith.engine.process", str(theirs.fileno())]
        environment = {**os.environ, **surroundings(os.environ)}
        # The child finds the package where this process found it, installed or not.
        environment[_LOGS] = f"{self._config.log_level}:{self._config.log_format}"
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        try:
            # A session of its own: Ctrl-C in the terminal reaches the parent alone, which ends the child.
            process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise EngineStartError(f"no process could be started: {error.strerror}") from None
        finally:
            theirs.close()
        self._process = process
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            writer.write(_frame((self._config, self._factory, os.getpid())))
            try:
                kind, value = pickle.loads(await _read(reader))
            except (asyncio.IncompleteReadError, ConnectionError):
                code = await asyncio.to_thread(process.wait)
                kind, value = "error", f"the engine process ended with status {code} while it was starting"
            if kind == "error":
                await asyncio.to_thread(process.wait)
                raise EngineStartError(value)
        except BaseException:  # a cancelled start leaves nothing running
            process.kill()
            writer.close()
            raise
        self._info, self._writer = value, writer
        self._generation += 1
        self._ready = True
        held, self._held = self._held, []
        for number, waiting in held:
            self._send(number, waiting)
        return reader

    def _send(self, number: int, command: Command) -> None:
        assert self._writer is not None
        self._writer.write(_frame((number, command)))

    async def _live(self, reader: asyncio.StreamReader | None) -> None:
        """Take replies; when the child dies, say so and start another."""
        while reader is not None:
            try:
                while True:
                    number, reply = pickle.loads(await _read(reader))
                    if isinstance(reply, Piece):
                        if (hear := self._parts.get(number)) is not None:
                            hear(reply)
                        continue
                    self._parts.pop(number, None)
                    future = self._pending.pop(number, None)
                    if future is not None and not future.done():  # done: nobody waits for it any more
                        future.set_result(reply)
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            except Exception:
                log.exception("the engine process sent what cannot be read")
            if self._stopping:
                return
            reader = await self._reborn()

    async def _reborn(self) -> asyncio.StreamReader | None:
        process = self._process
        assert process is not None
        self._ready = False
        if self._writer is not None:
            self._writer.close()
        if not await self._ended(process, 1.0):  # it hangs while ending, or speaks what cannot be read
            process.kill()
        code = await asyncio.to_thread(process.wait)
        log.error("the engine process died (status %s)", code)
        self._lose("the engine process died")
        lost = self._generation
        for callback in self._callbacks:
            try:
                callback(lost)
            except Exception:
                log.exception("a callback for the engine's death failed")
        while not self._stopping:
            now = time.monotonic()
            self._deaths = [t for t in self._deaths if now - t < _WINDOW] + [now]
            if len(self._deaths) >= _DEATHS:
                log.critical("the engine died %d times within %d s: giving up", _DEATHS, _WINDOW)
                self._given_up.set()
                self._lose("the engine keeps dying and has been given up")
                return None
            if len(self._deaths) > 1:  # the first time nobody waits
                await asyncio.sleep(_BACKOFF * 2.0 ** (len(self._deaths) - 2))
            try:
                return await self._spawn()
            except EngineStartError as error:
                log.error("the engine could not be started again: %s", error)
        return None

    def _lose(self, why: str) -> None:
        self._held.clear()
        self._parts.clear()
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(EngineLost(why))
                future.exception()  # nobody may be waiting any more


def _frame(value: object) -> bytes:
    data = pickle.dumps(value, protocol=5)
    return _LENGTH.pack(len(data)) + data


async def _read(reader: asyncio.StreamReader) -> bytes:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return await reader.readexactly(length)


# The child


class _Drivable(Protocol):
    intake: Callable[[float], bool]

    def info(self) -> EngineInfo: ...

    def submit(self, command: Command, answer: Callable[[Reply | Piece], None]) -> None: ...

    def step(self) -> bool: ...


def _receive(stream: Any) -> Any:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (length,) = _LENGTH.unpack(head)
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return pickle.loads(data)


def _serve(connection: socket.socket) -> None:
    """Build the engine that the parent describes and drive it until the parent says stop or is gone."""
    stream = connection.makefile("rb")
    try:
        config, factory, parent = _receive(stream)
    except (EOFError, OSError):
        return
    _end_with(parent)
    incoming: queue.SimpleQueue[tuple[int, Command] | None] = queue.SimpleQueue()
    outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def read() -> None:
        try:
            while (message := _receive(stream)) is not None:
                incoming.put(message)
        except (EOFError, OSError):
            os._exit(0)  # the parent is gone: nobody is left to answer, be it while a model loads
        incoming.put(None)

    def write() -> None:
        while (data := outgoing.get()) is not None:
            try:
                connection.sendall(data)
            except OSError:
                os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    engine = _build(config, factory, lambda kind, value: outgoing.put(_frame((kind, value))))
    if engine is not None:
        _drive(engine, incoming, lambda number, reply: outgoing.put(_frame((number, reply))))
    outgoing.put(None)
    writer.join()


def _build(config: EngineConfig, factory: str, say: Callable[[str, object], None]) -> _Drivable | None:
    """The engine, or None; the parent is told which, and in the second case why."""
    if config.threads is None:
        config = dataclasses.replace(config, threads=_cores())
    try:
        engine = _imported(factory)(config)
        gc.collect()
        gc.freeze()  # a full collection looks at a third of a million objects that stay, and takes 0.15 s
        say("ready", engine.info())
    except Exception as error:
        log.debug("the engine could not start", exc_info=True)
        text = str(error) or type(error).__name__
        known = type(error).__name__ == "ModelError"
        say("error", text if known else f"{type(error).__name__}: {text}")
        return None
    return engine


def _imported(factory: str) -> Callable[[EngineConfig], _Drivable]:
    """Import what makes the engine. Modules stay: to look through them for garbage, again and again while
    they are imported, takes a quarter of that."""
    module, _, name = factory.partition(":")
    postpone_compiler()
    gc.disable()
    try:
        make: Callable[[EngineConfig], _Drivable] = getattr(importlib.import_module(module), name)
        gc.freeze()
    finally:
        gc.enable()
    return make


def _cores() -> int:
    """Physical cores that this process may use: more threads than those only disturb each other."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return max(1, min(len(cores), int(_cpu_share(Path("/sys/fs/cgroup")))))


def _cpu_share(folder: Path) -> float:
    """How many CPUs a container's limit comes to, in either version of cgroups; many if there is none."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota = (folder / "cpu" / "cpu.cfs_quota_us").read_text()
        period = (folder / "cpu" / "cpu.cfs_period_us").read_text()
        if int(quota) > 0:
            return int(quota) / int(period)
    return 1e6


class _Intake:
    """Hands the engine what comes in."""

    def __init__(
        self,
        engine: _Drivable,
        incoming: queue.SimpleQueue[tuple[int, Command] | None],
        answer: Callable[[int, Reply | Piece], None],
        now: Callable[[], float],
    ) -> None:
        self._engine, self._incoming, self._answer, self._now = engine, incoming, answer, now
        self.stopping = False

    def __call__(self, seconds: float) -> bool:
        """Wait so long for a command at most, then submit it and those that stand behind it, for a moment:
        steps do not wait until all of a flood of them is taken. Whether there was any."""
        taken, until = False, math.inf
        patience = None if seconds == math.inf else seconds
        with contextlib.suppress(queue.Empty):
            while not self.stopping and (not taken or self._now() < until):
                wait = not taken and seconds > 0
                message = self._incoming.get(wait, patience if wait else None)
                if message is None:
                    self.stopping = True
                    break
                number, command = message
                until = until if taken else self._now() + _INTAKE
                taken = True
                self._engine.submit(command, functools.partial(self._answer, number))
        return taken


def _drive(
    engine: _Drivable,
    incoming: queue.SimpleQueue[tuple[int, Command] | None],
    answer: Callable[[int, Reply | Piece], None],
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Submit what has come in, step while there is work, sleep while there is none."""
    intake = engine.intake = _Intake(engine, incoming, answer, now)
    working = False
    while working or not intake.stopping:
        working |= intake(0.0 if working else math.inf)
        working = working and engine.step()


def _end_with(parent: int) -> None:
    """Ask Linux to end this process when its parent dies, however that happens."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(0)


def main() -> None:
    """The child's entry: the number of the socket's file descriptor is the only argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    level, form = os.environ.get(_LOGS, "warning:text").split(":")
    logs.set_up(level, form, "engine")
    _serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
