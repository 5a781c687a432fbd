"""State = fold(log), whatever dies: with an engine of words, so that a thousand deaths take seconds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.service.folding import Life, live
from tinsmith.service.caller import Caller
from tinsmith.service.errors import ServiceError
from tinsmith.service.futures import Outcome, Pending, Result
from tinsmith.service.service import Service
from tinsmith.store import ledger
from tinsmith.store.scope import SERVER
from tinsmith.wire.fields import Fields
from tinsmith.wire.requests import CreateSession, FinishSession, Target
from tinsmith.wire.sample_request import SampleRequest

Command = tuple[str, dict[str, Any]]


def script(seed: int, length: int) -> list[Command]:
    """A run's commands. The first makes it."""
    random_ = random.Random(seed)
    commands: list[Command] = [("create", {})]
    saved: list[str] = []
    for number in range(1, length):
        roll = random_.random()
        body = b"%d " % number + b"x" * random_.choice([1, 10, 100_000])
        if roll < 0.35:
            commands.append(("forward_backward", {"body": body}))
        elif roll < 0.40:
            commands.append(("forward_backward", {"body": body + b"wrong"}))
        elif roll < 0.45:
            commands.append(("forward", {"body": body + b"forward-only"}))
        elif roll < 0.70:
            commands.append(("optim", {"learning_rate": number / 1000}))
        elif roll < 0.72:
            commands.append(("optim", {"learning_rate": "much"}))
        elif roll < 0.80:
            name = random_.choice(["a", "b", f"n{number}"])
            commands.append(("save", {"path": name, "overwrite": name in saved and random_.random() < 0.8}))
            saved.append(name)
        elif roll < 0.86 and saved:
            commands.append(("load", {"name": random_.choice(saved), "optimizer": random_.random() < 0.5}))
        elif roll < 0.93:
            commands.append(("publish", {"sampling_session_seq_id": number}))
        elif roll < 0.95:
            commands.append(("publish", {"sampling_session_seq_id": number, "kind": "inflight"}))
        else:
            commands.append(("publish", {"path": f"s{number}"}))
    commands += [("forward_backward", {"body": b"last"}), ("optim", {"learning_rate": 0.5})]
    return [*commands, ("forward", {"body": b"forward-only"})]


@dataclass
class Client:
    """Sends a script's commands, some ahead and some out of order, and collects the answers. What it knows
    outlives the server."""

    commands: list[Command]
    seed: int
    run: str = ""
    sent: dict[int, str] = field(default_factory=dict)
    answers: dict[int, Any] = field(default_factory=dict)
    samples: dict[int, Any] = field(default_factory=dict)
    ahead: int = 6
    source: str = ""  # the checkpoint that the run is made from

    async def work(self, service: Service, caller: Caller) -> None:
        random_ = random.Random(self.seed)
        if not self.run:
            session = await service.sessions.create(caller, CreateSession((), None, "x", None, None))
            self.run = f"{session}:train:0"
        while len(self.answers) < len(self.commands):
            first = min(i for i in range(len(self.commands)) if i not in self.answers)
            window = [
                i for i in range(first, min(first + self.ahead, len(self.commands))) if i not in self.sent
            ]
            if 0 not in self.sent:
                window = [0]
            random_.shuffle(window)
            for seq_id in window:
                self.sent[seq_id] = await self._send(service, caller, seq_id)
                if random_.random() < 0.3:  # once more, as after an answer that was lost
                    assert await self._send(service, caller, seq_id) == self.sent[seq_id]
            if first in self.sent:
                await self._fetch(service, caller, first)

    async def _send(self, service: Service, caller: Caller, seq_id: int) -> str:
        kind, about = self.commands[seq_id]
        training, target = service.training, Target(self.run, seq_id)
        fields = {"model_id": self.run, "seq_id": seq_id}
        session = self.run.partition(":train:")[0]
        match kind:
            case "create":
                values = {"session_id": session, "model_seq_id": 0, "base_model": "m",
                          "lora_config": {"rank": 4, "seed": 1}}  # fmt: skip
                receipt = await training.create_model(caller, Fields(values))
            case "create_by_load":
                values = {"session_id": session, "model_seq_id": 0, "path": self.source, "optimizer": True}
                receipt = await training.create_by_load(caller, Fields(values))
            case "forward" | "forward_backward":
                receipt = await training.forward_backward(
                    caller, target, kind == "forward", about["body"], "identity"
                )
            case "optim":
                receipt = await training.optim_step(caller, Fields({**fields, "adam_params": about}))
            case "save":
                receipt = await training.save_weights(caller, Fields({**fields, **about}))
            case "load":
                path = f"tinker://{self.run}/weights/{about['name']}"
                values = {**fields, "path": path, "optimizer": about["optimizer"]}
                receipt = await training.load_weights(caller, Fields(values))
            case _:
                receipt = await training.save_weights_for_sampler(caller, Fields({**fields, **about}))
        return receipt.request_id

    async def _fetch(self, service: Service, caller: Caller, seq_id: int) -> None:
        outcome: Outcome | Pending = Pending()
        while isinstance(outcome, Pending):
            outcome = await service.outcome(caller, self.sent[seq_id])
        self.answers[seq_id] = self._plain(outcome)
        kind, about = self.commands[seq_id]
        if kind == "publish" and isinstance(outcome, Result) and "path" not in about:
            assert isinstance(outcome.payload, dict)
            await self._sample(service, caller, seq_id, str(outcome.payload["sampling_session_id"]))

    async def _sample(self, service: Service, caller: Caller, seq_id: int, sampler: str) -> None:
        """What weights without a name say; where they went with an engine, nothing."""
        for attempt in range(20):
            values = {"sampling_session_id": sampler, "seq_id": attempt, "num_samples": 1,
                      "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
                      "sampling_params": {"max_tokens": 4, "seed": 1}}  # fmt: skip
            try:
                promise = await service.sampling.sample(caller, SampleRequest.read(Fields(values)))
            except ServiceError:
                return
            outcome: Outcome | Pending = Pending()
            while isinstance(outcome, Pending):
                outcome = await service.outcome(caller, promise.request_id)
            if isinstance(outcome, Result):
                self.samples[seq_id] = self._plain(outcome)
                return

    def _plain(self, outcome: Outcome) -> Any:
        if isinstance(outcome, Result):
            text = (
                outcome.payload.decode()
                if isinstance(outcome.payload, bytes)
                else json.dumps(outcome.payload)
            )
        else:
            text = str(outcome)
        return text.replace(self.run.partition(":train:")[0] or "none", "SESSION")


def calmly(folder: Path, scripts: list[list[Command]], **settings: Any) -> list[Client]:
    clients = [Client(each, seed) for seed, each in enumerate(scripts)]

    async def work() -> None:
        life = await Life(folder, **settings).start()
        await asyncio.gather(*(each.work(life.service, life.caller) for each in clients))
        await life.stop()

    live(work)
    return clients


def wildly(
    folder: Path, scripts: list[list[Command]], seed: int, *, most: int = 40, **settings: Any
) -> tuple[list[Client], int, int]:
    """The same with kills of engine and server, and the tokens that were metered, and how many kills."""
    clients = [Client(each, place) for place, each in enumerate(scripts)]
    random_ = random.Random(seed)
    kills = trained = 0

    async def work() -> bool:
        """One life of the server. Whether all is done."""
        nonlocal kills, trained
        life = await Life(folder, random_.getrandbits(32), **settings).start()
        working = asyncio.gather(*(each.work(life.service, life.caller) for each in clients))
        while kills < most:
            await asyncio.wait({working}, timeout=random_.random() * random_.choice([0.002, 0.02, 0.1]))
            if working.done():
                break
            if random_.random() < 0.2:  # its runs are put away while they work
                session = random_.choice(clients).run.partition(":train:")[0]
                silence = life.service.runs._session_silent(session)
                await asyncio.wait({asyncio.ensure_future(silence)}, timeout=random_.random() / 50)
            kills += 1
            roll = random_.random()
            if roll < 0.6:
                if life.is_at_its_limit:  # one more would be the fault of what the engine does
                    continue
                life.engine.die()
                if random_.random() < 0.3:
                    await asyncio.sleep(0.01)
                life.engine.revive()
            elif roll < 0.9:
                working.cancel()
                life.kill(random_)
                return False
            else:
                stopping = asyncio.ensure_future(life.stop())
                await asyncio.wait({stopping}, timeout=random_.choice([0.005, 20]))
                working.cancel()
                if not stopping.done():
                    life.kill(random_)
                return False
        await asyncio.wait_for(working, 60)
        await life.stop()
        return True

    while not live(work):
        pass

    async def count() -> None:
        nonlocal trained
        life = Life(folder)
        rows = await life.store.read(lambda connection: ledger.sums(connection, SERVER, 0, 2**62))
        trained = sum(row.quantity for row in rows if row.kind == "train")
        life.store.close()

    live(count)
    return clients, kills, trained


def check(folder: Path, seed: int, *, runs: int = 3, length: int = 40, **settings: Any) -> int:
    scripts = [script(seed * 10 + place, length) for place in range(runs)]
    expected = calmly(folder / "calm", scripts)
    got, kills, trained = wildly(folder / "wild", scripts, seed, **settings)
    for mine, calm in zip(got, expected, strict=True):
        for seq_id, command in enumerate(mine.commands):
            assert mine.answers[seq_id] == calm.answers[seq_id], (seed, seq_id, command)
        for seq_id, sample in mine.samples.items():
            assert sample == calm.samples[seq_id], (seed, seq_id)
    assert trained == sum(
        len(about["body"])
        for each in expected
        for seq_id, (kind, about) in enumerate(each.commands)
        if kind.startswith("forward") and "Failure" not in each.answers[seq_id]
    )
    return kills


@pytest.mark.parametrize("every", [0.0, 1e9], ids=["snapshots", "no snapshots"])
def test_whatever_dies_every_outcome_is_that_of_a_calm_server(tmp_path: Path, every: float) -> None:
    assert check(tmp_path, 7, runs=2, length=30, snapshot_every=every) > 3


def test_what_the_engine_dies_of_again_and_again_is_given_up_and_nothing_else_is(tmp_path: Path) -> None:
    poison: list[list[Command]] = [script(seed, 30) for seed in (1, 2, 3)]
    poison[0][9] = ("forward_backward", {"body": b"deadly"})
    healthy = [list(each) for each in poison]
    healthy[0][9] = ("forward_backward", {"body": b"wrong"})
    expected = calmly(tmp_path / "calm", healthy)
    got = calmly(tmp_path / "wild", poison, snapshot_every=1e9)
    assert "the engine died 3 times while this request was carried out" in got[0].answers.pop(9)
    expected[0].answers.pop(9)
    assert [each.answers for each in got] == [each.answers for each in expected]


def test_numbers_that_were_given_up_stay_given_up(tmp_path: Path) -> None:
    client = Client([("create", {}), *[("optim", {"learning_rate": 1.0})] * 8], 0)

    async def first() -> None:
        life = await Life(tmp_path, gap_timeout=0.1).start()
        client.commands, rest = client.commands[:2], client.commands[2:]
        await client.work(life.service, life.caller)
        client.commands += rest
        client.sent[3] = await client._send(life.service, life.caller, 3)
        await client._fetch(life.service, life.caller, 3)
        life.kill(random.Random(0))

    async def second() -> None:
        life = await Life(tmp_path).start()  # with ten minutes for a gap
        for seq_id in (4, 2, 5):
            client.sent[seq_id] = await client._send(life.service, life.caller, seq_id)
            await client._fetch(life.service, life.caller, seq_id)
        await life.stop()

    live(first)
    live(second)
    assert "seq_id 2 of this training run never arrived" in client.answers[3]
    assert "seq_id 2 came after its turn" in client.answers[2]
    assert all("metrics" in client.answers[seq_id] for seq_id in (1, 4, 5))


def test_a_session_that_finishes_amid_a_replay_leaves_nothing_open(tmp_path: Path) -> None:
    client = Client(script(5, 30), 0, ahead=29)

    async def work() -> None:
        life = await Life(tmp_path).start()
        working = asyncio.ensure_future(client.work(life.service, life.caller))
        while len(life.engine.carried_out) < 5:
            await asyncio.sleep(0)
        life.engine.die()
        life.engine.revive()
        session = client.run.partition(":train:")[0]
        finish = FinishSession("success", None)
        await life.service.sessions.finish(life.caller, session, finish)
        with contextlib.suppress(ServiceError):
            await asyncio.wait_for(working, 20)
        for seq_id in client.sent:
            await asyncio.wait_for(client._fetch(life.service, life.caller, seq_id), 5)
        await life.stop()

    live(work)
    assert any("has finished" in str(answer) for answer in client.answers.values())
    assert list((tmp_path / "blobs" / "snapshots").iterdir()) == []


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_that_was_made_from_a_checkpoint_takes_that_one_again_or_none(
    tmp_path: Path, replaced: bool
) -> None:
    step: list[Command] = [("forward_backward", {"body": b"1"}), ("optim", {"learning_rate": 1.0})]
    source = Client([("create", {}), *step, ("save", {"path": "x"}), *step], 0)
    client = Client([("create_by_load", {}), *step, ("forward", {"body": b"forward-only"})], 0)

    async def first() -> None:
        life = await Life(tmp_path, snapshot_every=1e9).start()
        await source.work(life.service, life.caller)
        client.source = f"tinker://{source.run}/weights/x"
        await client.work(life.service, life.caller)
        if replaced:
            source.commands.append(("save", {"path": "x", "overwrite": True}))
            await source.work(life.service, life.caller)
        life.kill(random.Random(0))

    async def second() -> None:
        life = await Life(tmp_path).start()
        client.commands.append(("forward", {"body": b"forward-only"}))
        await client.work(life.service, life.caller)
        await life.stop()

    live(first)
    live(second)
    if replaced:
        assert "the checkpoint that seq_id 0 loaded is gone" in client.answers[4]
    else:
        assert client.answers[4] == client.answers[3]


def test_a_run_whose_log_is_incomplete_is_lost_and_says_why(tmp_path: Path) -> None:
    step: Command = ("optim", {"learning_rate": 1.0})
    client = Client([("create", {}), ("forward_backward", {"body": b"x" * 100_000}), step], 0)

    async def first() -> None:
        life = await Life(tmp_path, snapshot_every=1e9).start()
        await client.work(life.service, life.caller)
        life.kill(random.Random(0))

    async def second() -> None:
        life = await Life(tmp_path).start()
        for file in (tmp_path / "blobs" / "bodies").iterdir():
            file.unlink()
        client.commands += [step, ("forward", {"body": b"forward-only"})]
        await client.work(life.service, life.caller)
        await life.stop()

    async def third() -> None:
        life = await Life(tmp_path).start()
        client.commands.append(step)
        await client.work(life.service, life.caller)
        await life.stop()

    for life in (first, second, third):
        live(life)
    for seq_id in (3, 4, 5):
        assert "is missing in the data folder" in client.answers[seq_id]
        assert "it has no checkpoint" in client.answers[seq_id]
        assert "server" in client.answers[seq_id]


@pytest.mark.slow
def test_the_same_with_other_commands_and_deaths(tmp_path: Path) -> None:
    first, count = int(os.environ.get("SOAK_SEED", "100")), int(os.environ.get("SOAK_COUNT", "20"))
    for seed in range(first, first + count):
        check(tmp_path / str(seed), seed, snapshot_every=random.Random(seed).choice([0.0, 0.05, 1e9]))
