"""What one organization's flood does to another's steady work, through the SDK and HTTP.

    python bench/fairness.py [--quick] [--only shares|calls] [--json FILE] [--plot FILE]

The model of bench/train.py on a server of our own. One organization works steadily: a training step of
4 x 128 tokens, or a request for 4 sequences of 32 tokens, one after the other. Another floods the server from
a process of its own: training (four runs with eight requests of 4 x 512 tokens outstanding each), or samples
(64 requests for two sequences of 256 tokens outstanding). With equal weights the steady one is entitled to
half of the device, with weights 3:1 to three quarters: what it takes longer must not be more than that. What
the flood still does is counted beside it (training as its requests end, so in lumps), and what of the cores
its client takes, which no server can share out.

Then what a queue does to calls that need no device: 500 requests of the flood wait, half of them training
with bodies of 150 KB, each with its long poll.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard
from common import Target, machine, make_model, table, write
from engine_runs import MODEL, RANK, body, sequences
from flood import PROTOBUF, QUEUE
from serving import server

KINDS = ("training", "samples")
TOKENS = {"training": 4 * 128, "samples": 4 * 32}  # of one piece of the steady work


@dataclass
class Service:
    """A server of our own with this one model, and a key for each organization."""

    url: str
    key: str  # the operator's
    data: Path
    keys: dict[str, str]

    def operate(self, *words: str) -> str:
        command = [sys.executable, "-m", "tinsmith", *words, "--data", str(self.data)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def weigh(self, weight: int) -> None:
        """The steady organization's weight beside the other's, which is 1."""
        self.operate("limits", "set", "weight", str(weight), "--org", "steady")
        time.sleep(2.0)  # a running server looks every second


@contextlib.contextmanager
def service(folder: Path) -> Iterator[Service]:
    flags = ("--model", f"{MODEL}={folder}", "--dtype", "bf16", "--device", "cpu")
    with server(*flags, orderly=False) as (url, key, data):
        made = Service(url, key, data, {})
        for name in ("steady", "flood"):
            made.keys[name] = made.operate("keys", "create", name)
        yield made


# Beside the flood


def computed(made: Service) -> dict[str, float]:
    """Tokens that the engine has trained on and sampled so far."""
    request = urllib.request.Request(f"{made.url}/metrics", headers={"Authorization": f"Bearer {made.key}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        text = answer.read().decode()
    found = re.findall(r'^tinsmith_engine_tokens_total\{kind="(train|sample)"\} (\S+)', text, re.M)
    return {kind: float(count) for kind, count in found}


def cpu_seconds(pid: int) -> float:
    """That a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def flooded(kind: str, made: Service) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(Path(__file__).with_name("flood.py")), kind, made.url, made.keys["flood"]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "up"
        yield process
    finally:
        process.kill()
        process.wait()
        time.sleep(1.0)


# The steady work


def times(work: Callable[[], object], seconds: float, warm: int = 1) -> list[float]:
    """How long `work` takes, again and again for so many seconds."""
    for _ in range(warm):
        work()
    found = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found


def finish_flood(made: Service) -> None:
    """Let go of everything that the flood has left at the server."""
    import httpx

    with httpx.Client(
        base_url=f"{made.url}/api/v1/", headers={"X-API-Key": made.keys["flood"]}, timeout=60
    ) as http:
        for session in http.get("sessions").json()["sessions"]:
            http.post(f"sessions/{session}/finish", json={})


def small_calls(made: Service, quick: bool) -> dict[str, dict[str, list[float]]]:
    """Seconds of small calls of the steady organization: alone, while requests come, and while they wait."""
    import httpx

    from tinsmith.wire import tinsmith_pb2 as pb

    http = httpx.Client(
        base_url=f"{made.url}/api/v1/", headers={"X-API-Key": made.keys["steady"]}, timeout=60
    )
    session = http.post("create_session", json={"tags": [], "sdk_version": "x"}).json()["session_id"]
    calls: dict[str, Callable[[], object]] = {
        "GET training_runs": lambda: http.get("training_runs").raise_for_status(),
        "session_heartbeat": lambda: http.post("session_heartbeat", json={"session_id": session}),
        "create_session": lambda: http.post("create_session", json={"tags": [], "sdk_version": "x"}),
    }

    run = http.post("create_model", json={
        "session_id": session, "model_seq_id": 0, "base_model": MODEL, "lora_config": {"rank": RANK}
    }).json()["model_id"]  # fmt: skip
    places = iter(range(1, 10**6))

    def submit(lengths: list[int]) -> Callable[[], object]:
        """Training requests that their run refuses, so that nothing is computed."""
        message = pb.ForwardBackwardRequest.FromString(body(lengths, run, loss_fn="none"))
        headers = {**PROTOBUF, "Content-Encoding": "zstd"}

        def call() -> None:
            message.seq_id = next(places)
            content = zstandard.compress(message.SerializeToString())
            http.post("forward_backward", content=content, headers=headers).raise_for_status()

        return call

    calls["forward_backward, 1 KB"] = submit([64])
    calls["forward_backward, 150 KB"] = submit([512] * 24)

    def measure(seconds: float, until: Callable[[], bool] = lambda: False) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {name: [] for name in calls}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end and not until():
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                found[name].append(time.perf_counter() - start)
        return found

    found = {"alone": measure(3.0)}
    with flooded("queue", made) as process:
        queued: list[str] = []

        def read() -> None:
            assert process.stdout is not None
            queued.append(process.stdout.readline())

        threading.Thread(target=read, daemon=True).start()
        found["while they come"] = measure(25.0, lambda: bool(queued))
        found["while they wait"] = measure(3.0 if quick else 8.0)
    return found


def steady_work(made: Service) -> dict[str, Callable[[], object]]:
    import tinker
    from tinker import types

    client = tinker.ServiceClient(base_url=made.url, api_key=made.keys["steady"])
    run = client.create_lora_training_client(MODEL, rank=RANK)
    sampler = client.create_sampling_client(base_model=MODEL)
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(ids[:-1]),
            loss_fn_inputs={"target_tokens": types.TensorData(data=ids[1:], dtype="int64")},
        )
        for ids in sequences([128] * 4)
    ]
    prompt = types.ModelInput.from_ints(sequences([64])[0])
    params = types.SamplingParams(max_tokens=32, stop=[], seed=1)
    adam = types.AdamParams(learning_rate=1e-5)

    def train() -> None:
        loss, update = run.forward_backward(data, "cross_entropy"), run.optim_step(adam)
        loss.result()
        update.result()

    return {"training": train, "samples": lambda: sampler.sample(prompt, 4, params).result()}


def plot(path: Path, found: dict[tuple[str, str, int], float], alone: dict[str, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, kind in zip(axes, KINDS, strict=True):
        cases = [(f"{other},\n{weight}:1", value, weight)
                 for (mine, other, weight), value in found.items() if mine == kind]  # fmt: skip
        axis.bar(["alone", *(label for label, *_ in cases)],
                 [1.0, *(value / alone[kind] for _, value, _ in cases)])  # fmt: skip
        for index, (_, _, weight) in enumerate(cases, 1):
            bound = (weight + 1) / weight
            axis.plot(
                [index - 0.4, index + 0.4], [bound, bound], "k--", label="its share" if index == 1 else None
            )
        axis.set(title=f"steady {kind} beside a flood of ...", ylabel="time, of that alone", ylim=(0, None))
        axis.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


def _spread(seconds: list[float]) -> str:
    p50, p95 = np.percentile(seconds, [50, 95]) * 1e3
    return f"{p50:.1f} / {p95:.1f} / {max(seconds) * 1e3:.0f}"


def shares(made: Service, seconds: float, figure: Path | None) -> list[Target]:
    """The steady organization's work alone, and beside a flood."""
    found: dict[tuple[str, str, int], float] = {}
    flood: dict[tuple[str, str, int], tuple[str, str]] = {}
    work = steady_work(made)
    say("alone")
    alone = {kind: float(np.median(times(do, seconds, 3))) for kind, do in work.items()}
    for weight in (1, 3):
        made.weigh(weight)
        for other in KINDS:
            say(f"beside a flood of {other}, {weight}:1")
            with flooded(other, made) as process:
                for kind, do in work.items():
                    before, spent, start = computed(made), cpu_seconds(process.pid), time.perf_counter()
                    took = times(do, seconds)
                    passed, after = time.perf_counter() - start, computed(made)
                    of = "train" if other == "training" else "sample"
                    own = (1 + len(took)) * TOKENS[kind] if kind == other else 0
                    rate = (after[of] - before[of] - own) / passed
                    cores = (cpu_seconds(process.pid) - spent) / passed
                    found[kind, other, weight] = float(np.median(took))
                    flood[kind, other, weight] = f"{rate:.0f}", f"{cores:.2f}"
            finish_flood(made)
    made.weigh(1)
    rows = [("steady", "flood", "weights", "alone ms", "beside it ms", "times alone", "its share allows",
             "flood tok/s", "its client's cores")]  # fmt: skip
    targets = []
    for (kind, other, weight), took in sorted(found.items()):
        bound, ratio = (weight + 1) / weight, took / alone[kind]
        figures = (f"{1e3 * alone[kind]:.0f}", f"{1e3 * took:.0f}", f"{ratio:.2f}", f"{bound:.2f}")
        rows.append((kind, other, f"{weight}:1", *figures, *flood[kind, other, weight]))
        label = f"steady {kind} beside a flood of {other}, {weight}:1: of its share"
        targets.append(Target(8, label, 0.9, bound / ratio))
    print(table(rows) + "\n", flush=True)
    if figure is not None:
        plot(figure, found, alone)
    return targets


def calls(made: Service, quick: bool) -> list[Target]:
    """Its small calls, alone, while requests of another come, and while they wait."""
    say("a queue")
    small = small_calls(made, quick)
    rows = [("call", *(f"{when}: p50 / p95 / most ms" for when in small))]
    targets = []
    for call in small["alone"]:
        rows.append((call, *(_spread(when[call]) for when in small.values())))
        for when in ("while they come", "while they wait"):
            added = 1e3 * float(
                np.percentile(small[when][call], 95) - np.percentile(small["alone"][call], 50)
            )
            label = f"{call} {when} ({QUEUE} of another's): ms added, p95"
            targets.append(Target(8, label, 50, added, most=True))
    print(table(rows) + "\n", flush=True)
    return targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--json", type=Path, help="where to write the targets")
    parser.add_argument("--plot", type=Path, help="where to draw the figure")
    parser.add_argument("--only", choices=("shares", "calls"), help="one of the two parts")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    targets: list[Target] = []
    with tempfile.TemporaryDirectory() as name, service(make_model(Path(name) / "model")) as made:
        print(machine() + "\n")
        if args.only != "calls":
            targets += shares(made, 3.0 if args.quick else 7.0, args.plot)
        if args.only != "shares":
            targets += calls(made, args.quick)
    print(Target.table(targets))
    write(args.json, targets)


if __name__ == "__main__":
    main()
