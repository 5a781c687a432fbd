"""How the cost of a training step grows with tokens and with adapters.

    python bench/scaling.py [--quick] [--json FILE] [--plot FILE]

The model of bench/train.py on an engine in this process: one run with 16 to 16,384 tokens a step in sequences
of up to 512, and 1 to 64 runs with 64 tokens each. Linear means that twice as much costs at most twice as
much: the target is the largest growth of the cost of one from one size to twice that size.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from pathlib import Path

from common import Target, machine, make_model, median_time, table, write
from engine_runs import Runs, body

TOKENS = [16 << i for i in range(11)]
ADAPTERS = [1 << i for i in range(7)]
EACH = 64  # tokens of a run in the second series
NOISE = 1.1  # what a machine that others share adds between two measurements


def lengths(tokens: int) -> list[int]:
    return [512] * (tokens // 512) or [tokens]


def by_tokens(folder: Path, sizes: list[int], runs: int) -> dict[int, float]:
    """Seconds of a step by its number of tokens."""
    one = Runs(folder, 1)
    requests = {n: body(lengths(n)) for n in sizes}
    return {n: median_time(lambda b=b: one.step(b), runs) for n, b in requests.items()}  # type: ignore[misc]


def by_adapters(folder: Path, sizes: list[int], runs: int) -> dict[int, float]:
    """Seconds of a step by the number of runs that take part in it."""
    all_, request = Runs(folder, max(sizes), memory=20 << 30), body([EACH])
    return {n: median_time(lambda n=n: all_.step(request, busy=n), runs) for n in sizes}  # type: ignore[misc]


def growth(seconds: dict[int, float]) -> float:
    """The most by which the cost of a unit rises from one size to twice that size."""
    costs = [s / n for n, s in seconds.items()]
    return max(b / a for a, b in itertools.pairwise(costs))


def plot(path: Path, tokens: dict[int, float], adapters: dict[int, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    series = [(tokens, "tokens a step (one run)"), (adapters, f"runs, {EACH} tokens each")]
    for axis, (seconds, label) in zip(axes, series, strict=True):
        axis.plot(list(seconds), [1e3 * s for s in seconds.values()], "o-", label="a step")
        last = max(seconds)
        line = [1e3 * seconds[last] / last * n for n in seconds]
        axis.plot(list(seconds), line, ":", color="gray", label="in proportion")
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="milliseconds")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and runs")
    parser.add_argument("--json", type=Path, help="where to write the targets")
    parser.add_argument("--plot", type=Path, help="where to draw both series")
    args = parser.parse_args()
    runs = 1 if args.quick else 3
    with tempfile.TemporaryDirectory() as name:
        folder = make_model(Path(name))
        tokens = by_tokens(folder, TOKENS[:8] if args.quick else TOKENS, runs)
        adapters = by_adapters(folder, ADAPTERS[:5] if args.quick else ADAPTERS, runs)
    print(machine() + "\n")
    for what, seconds, unit in (("tokens", tokens, 1), ("runs", adapters, EACH)):
        rows = [(what, "ms a step", "us a token")]
        rows += [(str(n), f"{1e3 * s:.1f}", f"{1e6 * s / (n * unit):.0f}") for n, s in seconds.items()]
        print(table(rows) + "\n")
    targets = [
        Target(
            6, f"scaling: {what}, growth of the cost of one when twice as many", NOISE, growth(s), most=True
        )
        for what, s in (("tokens", tokens), ("adapters", adapters))
    ]
    print(Target.table(targets))
    write(args.json, targets)
    if args.plot is not None:
        plot(args.plot, tokens, adapters)


if __name__ == "__main__":
    from tinsmith.engine.process import surroundings

    if "GLIBC_TUNABLES" not in os.environ:  # the settings that the server gives its engine need a new start
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **surroundings(os.environ)})
    main()
