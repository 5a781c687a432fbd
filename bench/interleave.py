"""Training and sampling on one engine at a time: what each keeps of its speed, and how long a token takes.

    python bench/interleave.py [--quick] [--beside N] [--json FILE] [--plot FILE]

The model of bench/train.py on an engine in this process. Sampling is eight sequences of 64 + 128 tokens, a
new one for each that ends; training is one run with 4 x 512 tokens a step, submitted ahead. Each alone, then
both, then both with a checkpoint saved after every step. A token's time is that between it and the one before
in its sequence. Half of the device is each one's part; short passes cost training a little more. With
--beside all of it again while other processes keep as many cores busy: what a neighbour costs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from common import Target, machine, make_model, table, write
from engine_runs import MODEL, Runs, body

SEQUENCES, PROMPT, OUTPUT = 8, 64, 128
LENGTHS = [512] * 4
AHEAD = 2  # training steps under way
WARM = 2.0  # seconds before anything counts
LOADS = ("sampling alone", "training alone", "both", "both, a save each step")


@dataclass
class Load:
    """What an engine does for a while: sampling, training, saves."""

    runs: Runs
    request: bytes
    folder: Path
    gaps: list[float] = field(default_factory=list)  # seconds between a sequence's tokens
    sampled: int = 0  # tokens
    steps: list[float] = field(default_factory=list)  # when each step of training was done
    stopping: bool = False
    _calls: int = 0
    _pending: int = 0

    def run(self, seconds: float, *, samples: bool, training: bool, saves: bool) -> None:
        engine = self.runs.engine
        self.stopping = False
        if samples:
            for _ in range(SEQUENCES):
                self._sample()
        if training:
            for _ in range(AHEAD):
                self._train(saves)
        start = time.perf_counter()
        while (now := time.perf_counter()) < start + WARM + seconds:
            if now < start + WARM:
                self.gaps, self.sampled, self.steps = [], 0, []
            engine.step()
        gaps, sampled, steps = self.gaps, self.sampled, self.steps
        self.stopping = True
        while self._pending:
            engine.step()
        self.gaps, self.sampled, self.steps = gaps, sampled, steps

    def trained(self, tokens: int) -> float:
        """Tokens a second, with that many a step."""
        if len(self.steps) < 2:
            return 0.0
        return (len(self.steps) - 1) * tokens / (self.steps[-1] - self.steps[0])

    def _submit(self, command: object, answer: Callable[[object], None]) -> None:
        from tinsmith.engine.commands import Done, Piece

        def answered(reply: object) -> None:
            if not isinstance(reply, Piece):
                assert isinstance(reply, Done), reply
                self._pending -= 1
            answer(reply)

        self._pending += 1
        self.runs.engine.submit(command, answered)  # type: ignore[arg-type]

    def _sample(self) -> None:
        from tinsmith.engine.commands import Piece, Sample, SampleParams

        self._calls += 1
        prompt = np.random.default_rng(self._calls).integers(0, 8192, PROMPT).astype(np.int32)
        params = SampleParams(seed=self._calls, max_tokens=OUTPUT, stop=())
        before: list[float] = []

        def answer(reply: object) -> None:
            if isinstance(reply, Piece):
                if reply.token is not None:
                    now = time.perf_counter()
                    self.gaps += [now - t for t in before]
                    before[:] = [now]
                    self.sampled += 1
            elif not self.stopping:
                self._sample()

        self._submit(Sample(f"s{self._calls}", MODEL, None, prompt.tobytes(), params, stream=True), answer)

    def _train(self, saves: bool) -> None:
        from tinsmith.engine.commands import AdamParams, ForwardBackward, OptimStep, SaveState

        self._calls += 1
        path = self.folder / f"state-{self._calls}"

        def answer(_: object) -> None:
            shutil.rmtree(path, ignore_errors=True)
            self.steps.append(time.perf_counter())
            if not self.stopping:
                self._train(saves)

        self._submit(ForwardBackward("r0", 1, self.request), lambda _: None)
        self._submit(OptimStep("r0", 2, AdamParams()), (lambda _: None) if saves else answer)
        if saves:
            self._submit(SaveState("r0", 3, str(path)), answer)


@dataclass(frozen=True)
class Figures:
    """Tokens a second, and the times of sampled tokens in seconds, sorted."""

    sampled: float
    trained: float
    gaps: list[float]

    def at(self, part: float) -> float:
        """The time that this part of the tokens does not exceed; NaN without tokens."""
        return self.gaps[min(int(part * len(self.gaps)), len(self.gaps) - 1)] if self.gaps else float("nan")


def measure(folder: Path, seconds: float) -> tuple[dict[str, Figures], float]:
    """Figures by load, and the seconds of a pass of 512 tokens by itself."""
    from tinsmith.engine.rounds import SHARED_PASS_ROWS

    runs, found = Runs(folder, 1), {}
    gc.collect()
    gc.freeze()  # as the engine's process does
    with tempfile.TemporaryDirectory() as saved:
        for name in LOADS:
            load = Load(runs, body(LENGTHS), Path(saved))
            load.run(
                seconds,
                samples=name != "training alone",
                training=name != "sampling alone",
                saves="save" in name,
            )
            trained = load.trained(sum(LENGTHS))
            found[name] = Figures(load.sampled / seconds, trained, sorted(load.gaps))
    times = []
    short = body([SHARED_PASS_ROWS["cpu"]])
    for _ in range(7):
        start = time.perf_counter()
        runs.step(short)
        times.append(time.perf_counter() - start)
    return found, sorted(times)[3]


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that do nothing, each as fast as a core can."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def figures_table(found: dict[str, Figures]) -> str:
    rows = [("load", "sampled tok/s", "p50 ms", "p95 ms", "p99 ms", "max ms", "trained tok/s")]
    for name, figures in found.items():
        times = [f"{1e3 * figures.at(part):.1f}" if figures.gaps else "" for part in (0.5, 0.95, 0.99, 1.0)]
        sampled, trained = (f"{x:.0f}" if x else "" for x in (figures.sampled, figures.trained))
        rows.append((name, sampled, *times, trained))
    return table(rows)


def plot(path: Path, found: dict[str, Figures]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, figures in found.items():
        if figures.gaps:
            count = len(figures.gaps)
            beyond = [1 - i / count for i in range(count)]
            axis.step([1e3 * g for g in figures.gaps], beyond, where="post", label=name)
    axis.set(
        xscale="log", yscale="log", xlabel="milliseconds between two tokens", ylabel="part that takes longer"
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds of each")
    parser.add_argument(
        "--beside", type=int, default=0, metavar="N", help="cores kept busy, in a second round"
    )
    parser.add_argument("--json", type=Path, help="where to write the targets")
    parser.add_argument("--plot", type=Path, help="where to draw the distributions")
    args = parser.parse_args()
    seconds = 4.0 if args.quick else 15.0
    with tempfile.TemporaryDirectory() as name:
        folder = make_model(Path(name))
        found, one_pass = measure(folder, seconds)
        if args.beside:
            with neighbours(args.beside):
                disturbed, _ = measure(folder, seconds)
    alone, training, both, _ = (found[name] for name in LOADS)
    print(machine() + "\n")
    print(figures_table(found) + "\n")
    print(f"A step of 512 tokens, which a token may have to wait for: {1e3 * one_pass:.1f} ms\n")
    wait = one_pass + alone.at(0.5)
    targets = [
        Target(8, "both: sampling's speed, of its own alone", 0.4, both.sampled / alone.sampled),
        Target(8, "both: training's speed, of its own alone", 0.4, both.trained / training.trained),
        Target(
            8, "both: p99 of a token, times a pass and a token alone", 1.25, both.at(0.99) / wait, most=True
        ),
    ]
    if args.beside:
        print(f"With {args.beside} of {len(os.sched_getaffinity(0))} cores busy:\n")
        print(figures_table(disturbed) + "\n")
    print(Target.table(targets))
    write(args.json, targets)
    if args.plot is not None:
        plot(args.plot, found)


if __name__ == "__main__":
    from tinsmith.engine.process import surroundings

    if "GLIBC_TUNABLES" not in os.environ:  # the settings that the server gives its engine need a new start
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **surroundings(os.environ)})
    main()
