"""Real servers in processes of their own, and what tests say to them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import tinker
import zstandard
from tinker import types

from tinsmith.cli import main as operate
from tinsmith.wire import tinsmith_pb2 as pb

MODEL = "tests/tiny"
KEY = "tml-key-of-the-tests"
SERVE = [sys.executable, "-m", "tinsmith", "serve"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`tinsmith serve` with a tiny model. It can be stopped, killed and started again on its data."""

    def __init__(self, model: Path, data: Path, *flags: str) -> None:
        self.data = data
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.models = {MODEL: model}
        self.flags = list(flags)
        self.environment: dict[str, str] = {}
        self.log_file = data.parent / f"{data.name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> Server:
        command = [*SERVE, "--port", str(self.port), "--data", str(self.data), "--threads", "1"]
        command += ["--device", "cpu", "--dtype", "fp32", *self.flags]
        for name, path in self.models.items():
            command += ["--model", f"{name}={path}"]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TINSMITH_")},
            "TINSMITH_BOOTSTRAP_API_KEY": KEY,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **self.environment,
        }
        with open(self.log_file, "ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        if wait:
            self.wait_until_ready()
        return self

    def wait_until_ready(self, seconds: float = 60.0) -> None:
        with httpx.Client(timeout=5.0) as client:  # one for all questions: making one costs more than asking

            def ready() -> bool:
                assert self.process is not None
                if self.process.poll() is not None:
                    raise AssertionError(f"the server has ended:\n{self.log()}")
                try:
                    return client.get(f"{self.url}/api/v1/healthz").status_code == 200
                except httpx.TransportError:
                    return False

            wait_for(ready, seconds, "the server to be ready")

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60.0) -> int:
        """Stop it in the orderly way. The exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def kill(self) -> None:
        """As a power cut would."""
        assert self.process is not None
        for pid in [*descendants(self.process.pid), self.process.pid]:
            kill(pid)
        self.process.wait(10.0)

    def kill_engine(self) -> int:
        """Kill the engine alone; the server lives on."""
        assert self.process is not None
        pids = descendants(self.process.pid)
        assert pids, "there is no engine process"
        for pid in pids:
            kill(pid)
        return pids[0]

    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def end(self) -> None:
        if self.runs():
            self.kill()

    def log(self) -> str:
        return self.log_file.read_text()

    def raw(self, key: str = KEY) -> Raw:
        return Raw(self.url, key)

    @contextlib.contextmanager
    def sdk(self, key: str = KEY) -> Iterator[tinker.ServiceClient]:
        """A client as users have it, which finishes its session at the end."""
        with tinker.ServiceClient(base_url=self.url, api_key=key) as client:
            yield client

    def limit_file_size(self, size: int | None, *, everywhere: bool = False) -> None:
        """From now on the engine (or the server, too) cannot write longer files: as on a full disk, a
        write fails."""
        assert self.process is not None
        most = resource.RLIM_INFINITY if size is None else size
        for pid in [*descendants(self.process.pid), *([self.process.pid] if everywhere else [])]:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    def expire_checkpoints(self) -> None:
        """As if their time had come: by way of the database, since nobody can wait for an hour."""
        with contextlib.closing(sqlite3.connect(self.data / "tinsmith.db", timeout=10)) as database:
            database.execute("update checkpoints set expires_at = 1 where expires_at is not null")
            database.commit()

    def operate(self, *arguments: str) -> str:
        """An operator's command on the data folder, while the server runs. What it prints."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = operate([*arguments, "--data", str(self.data)])
        assert code == 0, (arguments, out.getvalue())
        return out.getvalue().strip()

    def new_key(self, name: str, *options: str) -> str:
        return self.operate("keys", "create", name, *options)

    def new_project(self, org: str, name: str) -> None:
        """A project in which every member of the organization may work."""
        self.operate("project", "create", name, "--org", org, "--everyone", "member")


class Raw:
    """HTTP without the SDK, for what the SDK would never send."""

    def __init__(self, url: str, key: str = KEY) -> None:
        self.http = httpx.Client(base_url=f"{url}/api/v1/", headers={"X-API-Key": key}, timeout=60.0)

    def post(self, path: str, body: object = None, **more: Any) -> httpx.Response:
        return self.http.post(path, json=body if body is not None else {}, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.http.get(path, **more)

    def ok(self, path: str, body: object = None) -> dict[str, Any]:
        answer = self.post(path, body)
        assert answer.status_code == 200, (answer.status_code, answer.text)
        result: dict[str, Any] = answer.json()
        return result

    def session(self) -> str:
        return str(
            self.ok("create_session", {"tags": [], "user_metadata": {}, "sdk_version": "x"})["session_id"]
        )

    def run(self, session: str, place: int = 0, **lora: object) -> str:
        """A new training run, ready to be trained."""
        body = {
            "session_id": session,
            "model_seq_id": place,
            "base_model": MODEL,
            "lora_config": {"rank": 4, "seed": 1, **lora},
        }
        receipt = self.ok("create_model", body)
        assert self.result(receipt["request_id"]) == {"type": "create_model", "model_id": receipt["model_id"]}
        return str(receipt["model_id"])

    def retrieve(self, request_id: str) -> httpx.Response:
        return self.post("retrieve_future", {"request_id": request_id, "allow_metadata_only": True})

    def result(self, request_id: str, seconds: float = 60.0) -> dict[str, Any]:
        """The outcome of a request, JSON or protobuf (then as {"protobuf": bytes}), however long it takes."""
        deadline = time.monotonic() + seconds
        while (answer := self.retrieve(request_id)).status_code == 408 and time.monotonic() < deadline:
            pass
        assert answer.status_code == 200, (answer.status_code, answer.text)
        if answer.headers["content-type"] == "application/x-protobuf":
            return {"protobuf": answer.content}
        result: dict[str, Any] = answer.json()
        return result

    def optim(self, run: str, seq_id: int, **params: object) -> str:
        body = {"model_id": run, "seq_id": seq_id, "adam_params": {"learning_rate": 0.1, **params}}
        return str(self.ok("optim_step", body)["request_id"])

    def forward_backward(self, run: str, seq_id: int, body: bytes | None = None, *, zstd: bool = True) -> str:
        return str(self.send_forward_backward(run, seq_id, body, zstd=zstd).json()["request_id"])

    def send_forward_backward(
        self, run: str, seq_id: int, body: bytes | None = None, *, zstd: bool = True
    ) -> httpx.Response:
        content = body if body is not None else training_body(run, seq_id)
        headers = {"Content-Type": "application/x-protobuf"}
        if zstd:
            content, headers["Content-Encoding"] = zstandard.ZstdCompressor().compress(content), "zstd"
        return self.http.post("forward_backward", content=content, headers=headers)

    def save(self, run: str, seq_id: int, name: str, **more: object) -> str:
        body = {"model_id": run, "seq_id": seq_id, "path": name, **more}
        return str(self.ok("save_weights", body)["request_id"])


def training_body(
    run: str, seq_id: int, lengths: Sequence[int] = (8,), loss_fn: str = "cross_entropy"
) -> bytes:
    """A serialized ForwardBackwardRequest."""
    message = pb.ForwardBackwardRequest(model_id=run, seq_id=seq_id, loss_fn=loss_fn)
    for length in lengths:
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.arange(length, dtype=np.int32).tobytes()
        for name, array in (
            ("target_tokens", np.arange(1, length + 1, dtype=np.int64)),
            ("weights", np.ones(length, np.float32)),
        ):
            tensor = datum.loss_fn_inputs[name]
            tensor.dense, tensor.shape[:] = array.tobytes(), [length]
            tensor.dtype = pb.DTYPE_INT64 if name == "target_tokens" else pb.DTYPE_FLOAT32
    return message.SerializeToString()


def datum(length: int = 8, first: int = 0, **inputs: types.TensorData) -> types.Datum:
    """A cross_entropy datum, as the SDK has it."""
    tokens = [(first + i) % 256 for i in range(length)]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=[(t + 1) % 256 for t in tokens], dtype="int64"),
            "weights": types.TensorData(data=[1.0] * length, dtype="float32"),
            **inputs,
        },
    )


def exit_code(done: subprocess.CompletedProcess[str]) -> int:
    """With what an SDK program ended, by itself.

    The SDK's HTTP transport, pyqwest, has threads of its own. One that comes back to an interpreter which has
    just ended is unwound by Python 3.11 through frames of Rust, which cannot be, and the process aborts after
    all that it had to say was said (once in 200 on a busy machine). What it printed tells how it went.
    """
    if done.returncode == -signal.SIGABRT and "Traceback" not in done.stderr:
        return 0 if done.stdout else 1
    return done.returncode


def wait_for(condition: Callable[[], object], seconds: float = 30.0, what: str = "it to happen") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s for {what}")
        time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    """The children of a process and theirs, without Python's own helper for shared resources."""
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in listing.read_text().split()]
        except OSError:
            continue
        for child in children:
            with contextlib.suppress(OSError):
                if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                    found += [child, *descendants(child)]
    return found


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def detail(response: httpx.Response) -> str:
    """The text of a refusal, which every error answer has."""
    return str(json.loads(response.content)["detail"])
