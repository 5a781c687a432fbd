"""Kills at random moments: whatever dies, every result is that of a server that nothing happened to."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness import MODEL, Raw, Server, training_body
from tests.service.test_books import tokens, usage
from tinsmith.wire import tinsmith_pb2 as pb

AHEAD = 5  # requests of a run that are on their way
Command = tuple[str, dict[str, Any]]


def script(seed: int, length: int) -> list[Command]:
    """A run's commands, of all kinds, some of them wrong. The first one makes it."""
    random_ = random.Random(seed)
    optimizer = "dimuon" if seed % 3 == 2 else "adamw"
    commands: list[Command] = [("create", {"optimizer": optimizer})]
    saved: list[str] = []
    for number in range(length):
        roll = random_.random()
        if roll < 0.40:
            lengths = tuple(random_.randint(2, 60) for _ in range(random_.randint(1, 6)))
            commands.append(("forward_backward", {"lengths": lengths}))
        elif roll < 0.72:
            commands.append(
                ("optim", {"learning_rate": random_.choice([0.01, 0.001]), "optimizer": optimizer})
            )
        elif roll < 0.78:
            commands.append(("forward_backward", {"lengths": (5,), "loss_fn": "no_such_loss"}))
        elif roll < 0.86:
            name = random_.choice(["a", "b", "c", f"n{number}"])
            commands.append(("save", {"name": name, "overwrite": name in saved}))
            saved.append(name)
        elif roll < 0.90 and saved:
            commands.append(("load", {"name": random_.choice(saved), "optimizer": random_.random() < 0.5}))
        elif roll < 0.96:
            commands.append(("publish", {"place": number}))
        else:
            commands.append(("publish", {"name": f"s{number}"}))
    commands.append(("forward_backward", {"lengths": (9, 17)}))
    commands.append(("optim", {"learning_rate": 0.01, "optimizer": optimizer}))
    commands.append(("forward_backward", {"lengths": (9, 17)}))
    return commands


@dataclass
class Trainer:
    """Carries a script out, however often the server goes away. `answers` are what came, in order."""

    url: str
    key: str
    commands: list[Command]
    answers: list[Any] = field(default_factory=list)
    sampled: dict[int, Any] = field(default_factory=dict)
    tokens: int = 0
    failure: BaseException | None = None

    def work(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.failure = error

    def _patiently(self, call: Callable[[], httpx.Response]) -> httpx.Response:
        deadline = time.monotonic() + 300
        while True:
            with contextlib.suppress(httpx.TransportError):
                answer = call()
                if answer.status_code not in (503, 408):
                    return answer
            assert time.monotonic() < deadline, "the server did not answer for 300 s"
            time.sleep(0.05)

    def _work(self) -> None:
        self.raw = raw = Raw(self.url, self.key)
        body = {"tags": [], "user_metadata": {}, "sdk_version": "x"}
        self.session = self._patiently(lambda: raw.post("create_session", body)).json()["session_id"]
        self.run = f"{self.session}:train:0"
        pending: list[tuple[int, str]] = []
        for seq_id, command in enumerate(self.commands):
            pending.append((seq_id, self._send(seq_id, *command)))
            if len(pending) > AHEAD:
                self._fetch(*pending.pop(0))
        for each in pending:
            self._fetch(*each)

    def _send(self, seq_id: int, kind: str, about: dict[str, Any]) -> str:
        raw, run = self.raw, self.run
        target = {"model_id": run, "seq_id": seq_id}
        if kind == "forward_backward":
            content = training_body(run, seq_id, about["lengths"], about.get("loss_fn", "cross_entropy"))
            answer = self._patiently(lambda: raw.send_forward_backward(run, seq_id, content))
        else:
            adam = about.get("optimizer") != "dimuon"
            params = {"type": "adamw" if adam else "dimuon", "learning_rate": about.get("learning_rate")}
            path, body = {
                "create": (
                    "create_model",
                    {
                        "session_id": self.session,
                        "model_seq_id": 0,
                        "base_model": MODEL,
                        "lora_config": {"rank": 4, "seed": 1},
                        **({} if adam else {"optimizer_config": {"type": "dimuon"}}),
                    },
                ),
                "optim": ("optim_step", {**target, "optimizer_params": params}),
                "save": (
                    "save_weights",
                    {**target, "path": about.get("name"), "overwrite": about.get("overwrite")},
                ),
                "load": (
                    "load_weights",
                    {
                        **target,
                        "path": f"tinker://{run}/weights/{about.get('name')}",
                        "optimizer": about.get("optimizer"),
                    },
                ),
                "publish": (
                    "save_weights_for_sampler",
                    {**target, "path": about["name"]}
                    if "name" in about
                    else {**target, "sampling_session_seq_id": about.get("place")},
                ),
            }[kind]
            answer = self._patiently(lambda: raw.post(path, body))
        assert answer.status_code == 200, (kind, about, answer.text)
        return str(answer.json()["request_id"])

    def _fetch(self, seq_id: int, request_id: str) -> None:
        answer = self._patiently(lambda: self.raw.retrieve(request_id))
        assert answer.status_code == 200, (self.commands[seq_id], answer.text)
        binary = answer.headers["content-type"] == "application/x-protobuf"
        kind, about = self.commands[seq_id]
        if binary:
            self.tokens += sum(about["lengths"])
            self.answers.append((kind, answer.content))
        else:
            self.answers.append((kind, answer.text.replace(self.session, "SESSION")))
        if kind == "publish" and "place" in about:
            self._sample(seq_id, answer.json()["sampling_session_id"])

    def _sample(self, seq_id: int, sampler: str) -> None:
        """What its newest weights say; nothing where they went with an engine."""
        body = {
            "sampling_session_id": sampler,
            "seq_id": 0,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
            "sampling_params": {"max_tokens": 6, "seed": 5, "stop": []},
        }
        while True:
            answer = self._patiently(lambda: self.raw.post("asample", body))
            if answer.status_code == 410:
                return
            assert answer.status_code == 200, answer.text
            result = self._patiently(partial(self.raw.retrieve, answer.json()["request_id"]))
            if result.status_code == 410:
                body["seq_id"] += 1
                continue
            assert result.status_code == 200, result.text
            if "error" in result.text and result.headers["content-type"] == "application/json":
                raise AssertionError(result.text)
            response = pb.SampleResponse.FromString(result.content)
            self.sampled[seq_id] = [(each.tokens, each.logprobs) for each in response.sequences]
            return


def carry_out(
    server: Server, key: str, scripts: list[list[Command]]
) -> tuple[list[Trainer], list[threading.Thread]]:
    trainers = [Trainer(server.url, key, each) for each in scripts]
    threads = [threading.Thread(target=trainer.work, daemon=True) for trainer in trainers]
    for thread in threads:
        thread.start()
    return trainers, threads


@pytest.mark.slow
def test_whatever_dies_every_result_is_what_it_would_have_been(tiny_model: Path, tmp_path: Path) -> None:
    seconds = float(os.environ.get("SOAK_SECONDS", "60"))
    length = int(os.environ.get("SOAK_LENGTH", "150"))
    seed = int(os.environ.get("SOAK_SEED", "1"))
    random_ = random.Random(seed)
    scripts = [script(seed * 100 + place, length) for place in range(4)]
    calm = Server(tiny_model, tmp_path / "calm").start()
    expected, threads = carry_out(calm, calm.new_key("calm"), scripts)
    for thread in threads:
        thread.join(300)
    calm.stop()
    assert [each.failure for each in expected] == [None] * len(scripts)

    wild = Server(
        tiny_model,
        tmp_path / "wild",
        "--snapshot-every",
        os.environ.get("SOAK_EVERY", "0.5"),
        "--poll-hold",
        "2",
    ).start()
    began, kills = time.monotonic(), 0
    try:
        got, threads = carry_out(wild, wild.new_key("wild"), scripts)
        while any(thread.is_alive() for thread in threads):
            time.sleep(random_.choice([0.05, 0.3, 1.0, 2.0]) * random_.random())
            if time.monotonic() - began > seconds:
                for thread in threads:
                    thread.join(300)
                break
            kills += 1
            if random_.random() < 0.5:
                time.sleep(0.5)  # what the engine dies of again and again is given up
                with contextlib.suppress(AssertionError):
                    wild.kill_engine()
                wild.wait_until_ready()
            else:
                wild.kill()
                wild.start()
        print(f"{kills} kills in {time.monotonic() - began:.0f} s")
        for trainer, calmly in zip(got, expected, strict=True):
            assert trainer.failure is None, (trainer.failure, wild.log()[-3000:])
            for number, (one, other) in enumerate(zip(trainer.answers, calmly.answers, strict=True)):
                assert one == other, (number, trainer.commands[number])
            for seq_id, sample in trainer.sampled.items():
                assert sample == calmly.sampled[seq_id]
        assert "is lost" not in wild.log()
        assert tokens(usage(wild, "--org", "wild"))["train"] == sum(each.tokens for each in expected)
    finally:
        wild.end()
