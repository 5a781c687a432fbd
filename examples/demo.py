"""The demo: a server of our own, a supervised run and a reinforcement learning run against it, and a plot.

make demo
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(data: Path, port: int, key: str) -> subprocess.Popen[bytes]:
    """The server, ready to work."""
    command = [sys.executable, "-m", "tinsmith", "serve", "--port", str(port), "--data", str(data)]
    server = subprocess.Popen(command, env={**os.environ, "TINSMITH_BOOTSTRAP_API_KEY": key})
    try:
        for _ in range(240):
            if server.poll() is not None:
                raise SystemExit("the server did not start")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/healthz", timeout=5):
                    return server
            except OSError:
                time.sleep(0.5)
        raise SystemExit("the server was not ready within two minutes")
    except BaseException:
        stop(server)
        raise


def stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def run(name: str, title: str, log: Path, url: str, key: str, *options: str) -> list[dict[str, float]]:
    """One example with its output live; what it logged."""
    print(f"\n== {title}\n", flush=True)
    environment = {**os.environ, "TINKER_BASE_URL": url, "TINKER_API_KEY": key, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE / name), "--log", str(log), *options]
    subprocess.run(command, env=environment, check=True)
    return [json.loads(line) for line in log.read_text().splitlines()]


def plot(sft: list[dict[str, float]], rl: list[dict[str, float]], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    steps = [r for r in sft if "loss" in r]
    held = [r for r in sft if "held_out_accuracy" in r]
    left.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="#4c72b0", label="training loss")
    left.plot(
        [r["step"] for r in held],
        [r["held_out_loss"] for r in held],
        "o-",
        color="#1f3b63",
        label="held-out loss",
    )
    left.set(title="Supervised: rotate a list", xlabel="step", ylabel="loss per token (nats)", ylim=(0, None))
    share = left.twinx()
    share.plot(
        [r["step"] for r in held],
        [r["held_out_accuracy"] for r in held],
        "s--",
        color="#dd8452",
        label="held-out accuracy",
    )
    share.set(ylabel="held-out accuracy", ylim=(-0.02, 1.02))
    lines = [*left.get_lines(), *share.get_lines()]
    left.legend(lines, [line.get_label() for line in lines], loc="center right", frameon=False)
    rewards = [r for r in rl if "reward" in r]
    right.plot([r["step"] for r in rewards], [r["reward"] for r in rewards], color="#55a868")
    end = next(r for r in rl if "held_out_after" in r)
    right.scatter(
        [0, end["step"]], [end["held_out_before"], end["held_out_after"]], color="#2a5a36", zorder=3
    )
    for x, y in ((0, end["held_out_before"]), (end["step"], end["held_out_after"])):
        right.annotate(f"held-out {y:.2f}", (x, y), textcoords="offset points", xytext=(0, -17), ha="center")
    right.set(
        title="Reinforcement: add two numbers",
        xlabel="step",
        ylabel="mean reward of the rollouts",
        ylim=(0, 1.05),
    )
    right.margins(x=0.15)
    for axis in (left, right):
        axis.spines[["top"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.suptitle("tinsmith/tin-5m, trained through the official SDK on this machine")
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where the plot and the logs go")
    parser.add_argument("--short", action="store_true", help="a few steps only, to see that everything works")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    few = ["--steps", "2", "--held-out", "4"] if args.short else []
    port, key = free_port(), f"tml-{secrets.token_hex(16)}"
    began = time.time()
    # A kill by `make` or a terminal must still run the clean-up below.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as data:
        print("Starting a Tinsmith server on this machine", flush=True)
        server = start(Path(data), port, key)
        try:
            url = f"http://127.0.0.1:{port}"
            sft = run(
                "sft.py",
                "Supervised fine-tuning: a task it does not know",
                args.out / "sft.jsonl",
                url,
                key,
                *few,
            )
            rl = run(
                "rl.py",
                "Reinforcement learning: sums, rewarded when right",
                args.out / "rl.jsonl",
                url,
                key,
                *few,
            )
        finally:
            stop(server)
    plot(sft, rl, args.out / "demo.png")
    held = [r for r in sft if "held_out_accuracy" in r]
    end = next(r for r in rl if "held_out_after" in r)
    print(f"""
== What was learned, in {time.time() - began:.0f} s

                            before   after
  SFT  held-out loss        {held[0]["held_out_loss"]:6.3f}  {held[-1]["held_out_loss"]:6.3f}
  SFT  held-out accuracy    {held[0]["held_out_accuracy"]:6.0%}  {held[-1]["held_out_accuracy"]:6.0%}
  RL   held-out reward      {end["held_out_before"]:6.3f}  {end["held_out_after"]:6.3f}

The plot: {args.out / "demo.png"}""")


if __name__ == "__main__":
    try:
        main()
    except (subprocess.CalledProcessError, KeyboardInterrupt) as error:
        raise SystemExit(f"the demo did not finish: {error or 'interrupted'}") from None
