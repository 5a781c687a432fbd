"""The engine's process: order, large frames, death, restart, and a clean end."""

from __future__ import annotations

import asyncio
import gc
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tinsmith.engine.commands import (
    Command,
    Done,
    EngineConfig,
    EngineInfo,
    EngineLost,
    ForwardBackward,
    GetStatus,
    ModelSource,
    Reply,
)
from tinsmith.engine.process import EngineStartError, ProcessEngine, _cores, _cpu_share, _drive


class EchoEngine:
    """Answers a step later, with what it was told; "slow" takes its time, "die" dies, "frozen" says what the
    collection of garbage does not look at."""

    def __init__(self, config: EngineConfig) -> None:
        if config.models:
            raise ValueError(f"no model {config.models[0].name}")
        self.todo: list[tuple[Command, Callable[[Reply], None]]] = []

    def info(self) -> EngineInfo:
        return EngineInfo("test", True, {}, {})

    def submit(self, command: Command, answer: Callable[[Reply], None]) -> None:
        self.todo.append((command, answer))

    def step(self) -> bool:
        command, answer = self.todo.pop(0)
        assert isinstance(command, ForwardBackward)
        if command.run == "slow":
            time.sleep(0.5)
        if command.run == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        answer(Done(gc.get_freeze_count() if command.run == "frozen" else command.body))
        return bool(self.todo)


class SleepyEngine(EchoEngine):
    """Takes its time to load."""

    def __init__(self, config: EngineConfig) -> None:
        time.sleep(60)
        super().__init__(config)


def told(run: str, body: bytes = b"") -> ForwardBackward:
    return ForwardBackward(run, 1, body)


@asynccontextmanager
async def running(**config: Any) -> AsyncIterator[ProcessEngine]:
    engine = ProcessEngine(
        EngineConfig(models=(), spill_dir="", **config), factory="tests.engine.test_process:EchoEngine"
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop(0.1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_parent_imports_no_torch() -> None:
    code = "import tinsmith.engine.process, tinsmith.engine.commands, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_replies_come_in_order_and_frames_may_be_large() -> None:
    async def main() -> None:
        async with running() as engine:
            large = os.urandom(120 << 20)
            futures = [engine.submit(told("x", b)) for b in (b"1", large, b"3")]
            replies = await asyncio.gather(*futures)
            assert [r.payload for r in replies if isinstance(r, Done)] == [b"1", large, b"3"]

    asyncio.run(main())


def test_a_dead_engine_is_reported_and_started_again() -> None:
    async def main() -> None:
        async with running() as engine:
            lost: list[int] = []
            engine.on_lost(lost.append)
            first = engine.pid
            assert isinstance(await engine.submit(told("slow")), Done)
            waiting = [engine.submit(told("die")), engine.submit(told("x"))]
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(r) for r in results] == [EngineLost, EngineLost]
            assert lost == [1]
            assert isinstance(await engine.submit(told("x", b"again")), Done)  # waits for the new life
            assert engine.generation == 2
            assert engine.pid != first

    asyncio.run(main())


def test_an_engine_that_keeps_dying_is_given_up() -> None:
    async def main() -> None:
        async with running() as engine:
            for _ in range(5):
                with pytest.raises(EngineLost):
                    await engine.submit(told("die"))
            await asyncio.wait_for(engine.given_up(), 5.0)
            with pytest.raises(EngineLost):
                await engine.submit(told("x"))
            assert not engine.ready

    asyncio.run(main())


def test_a_cancelled_wait_and_a_failing_callback_disturb_nobody() -> None:
    async def main() -> None:
        async with running() as engine:
            lost: list[int] = []
            engine.on_lost(lambda _: 1 / 0)  # type: ignore[arg-type, return-value]
            engine.on_lost(lost.append)
            waiting = asyncio.ensure_future(engine.submit(told("slow")))
            behind = engine.submit(told("x", b"behind"))
            await asyncio.sleep(0.05)
            waiting.cancel()
            assert await behind == Done(b"behind")
            with pytest.raises(EngineLost):
                await engine.submit(told("die"))
            assert await engine.submit(told("x", b"again")) == Done(b"again")
            assert lost == [1]

    asyncio.run(main())


def test_stop_while_it_starts_waits_for_nothing() -> None:
    async def main(grace: float) -> None:
        engine = ProcessEngine(EngineConfig((), ""), factory="tests.engine.test_process:SleepyEngine")
        starting = asyncio.create_task(engine.start())
        early = engine.submit(told("x"))  # waits for the start
        while engine.pid is None:
            await asyncio.sleep(0.01)
        pid = engine.pid
        starting.cancel()
        began = time.monotonic()
        await engine.stop(grace)
        assert time.monotonic() - began < 5
        assert not alive(pid)
        with pytest.raises(EngineLost):
            await early

    asyncio.run(main(60.0))


def test_stop_lets_work_finish_and_leaves_no_process() -> None:
    async def main() -> None:
        async with running() as engine:
            pid = engine.pid
            assert pid is not None
            work = [engine.submit(told("slow")), engine.submit(told("x", b"last"))]
            await engine.stop(10)
            assert [type(r) for r in await asyncio.gather(*work)] == [Done, Done]
            assert not alive(pid)
            with pytest.raises(EngineLost):
                await engine.submit(told("x"))

    asyncio.run(main())


def test_stop_without_grace_does_not_wait() -> None:
    async def main() -> None:
        async with running() as engine:
            pid = engine.pid
            work = [engine.submit(told("slow")) for _ in range(20)]
            began = time.monotonic()
            await engine.stop(0)
            assert time.monotonic() - began < 5
            assert pid is not None
            assert not alive(pid)
            results = await asyncio.gather(*work, return_exceptions=True)
            assert isinstance(results[-1], EngineLost)

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["EchoEngine", "SleepyEngine"])
def test_the_child_ends_with_its_parent(kind: str) -> None:
    code = f"""
import asyncio, sys
from tests.engine.test_process import ProcessEngine, EngineConfig
async def main():
    engine = ProcessEngine(EngineConfig((), ""), factory="tests.engine.test_process:{kind}")
    starting = asyncio.ensure_future(engine.start())
    await asyncio.wait([starting], timeout=2)
    assert starting.done() == ({kind!r} == "EchoEngine")
    print(engine.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
        parent.wait()
    for _ in range(100):
        if not alive(pid):
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the engine outlived its parent")


def test_a_container_limit_is_read(tmp_path: Path) -> None:
    assert _cpu_share(tmp_path) > 1000
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert _cpu_share(tmp_path) > 1000
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert _cpu_share(tmp_path) == 2.5
    assert 1 <= _cores() <= (os.cpu_count() or 1)


class TestStart:
    def test_an_error_is_one_clean_message(self) -> None:
        config = EngineConfig((ModelSource("no/such", "/nowhere"),), "")
        engine = ProcessEngine(config, factory="tests.engine.test_process:EchoEngine")
        with pytest.raises(EngineStartError, match=r"^ValueError: no model no/such$"):
            asyncio.run(engine.start())

    def test_the_real_engine_starts_and_names_a_missing_folder(self, folder: Callable[[str], Path]) -> None:
        async def main() -> None:
            good = ProcessEngine(
                EngineConfig((ModelSource("a/b", str(folder("qwen3"))),), "", "cpu", "fp32", threads=1)
            )
            info = await good.start()
            assert info.models["a/b"].vocab_size == 512
            reply = await good.submit(GetStatus())
            assert isinstance(reply, Done)
            await good.stop(1)
            bad = ProcessEngine(EngineConfig((ModelSource("a/b", "/nowhere"),), ""))
            with pytest.raises(EngineStartError, match=r"^a/b: there is no folder /nowhere$"):
                await bad.start()

        asyncio.run(main())


def test_what_was_loaded_is_no_work_for_the_collection_of_garbage() -> None:
    async def scenario() -> None:
        async with running() as engine:
            reply = await engine.submit(told("frozen"))
            assert isinstance(reply, Done)
            assert reply.payload > 10_000  # type: ignore[operator]

    asyncio.run(scenario())


def test_steps_do_not_wait_until_a_flood_of_commands_is_taken() -> None:
    """Each takes 12 ms to take, and there are 50 for it between two steps."""
    time_now, steps = 0.0, []

    class Slow(EchoEngine):
        def submit(self, command: Command, answer: Callable[[Reply], None]) -> None:
            nonlocal time_now
            time_now += 0.012
            super().submit(command, answer)

        def step(self) -> bool:
            steps.append(len(self.todo))
            return super().step()

    incoming: queue.SimpleQueue[tuple[int, Command] | None] = queue.SimpleQueue()
    for i in range(20):
        incoming.put((i, told("r")))
    incoming.put(None)
    answered: list[int] = []
    _drive(Slow(EngineConfig((), "")), incoming, lambda i, _: answered.append(i), lambda: time_now)
    assert answered == list(range(20))
    assert steps[:5] == [5, 9, 13, 17, 16], "five are taken at a time, one is answered a step"
