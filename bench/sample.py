"""Sampling throughput in the engine against transformers' generate.

    python bench/sample.py [--quick] [--json FILE]

The same Qwen3-shaped model of 33.6 M parameters in bf16; 64 prompt tokens and 128 sampled ones a sequence.
The floor: the prompts' arithmetic at the rate of a large product, and for every sampled token of a batch
its arithmetic, or the reading of all weights and adapters once, whichever takes longer; the rates are this
machine's, measured in the same run. Then a prompt of 512 tokens that 16 samples share: the time to its first
token, and again when the cache knows it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import (
    Target,
    gemm_rate,
    machine,
    make_model,
    median_time,
    read_rate,
    table,
    with_surroundings,
    write,
)

PROMPT, OUTPUT = 64, 128


def prompts(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 8192, (count, PROMPT)).astype(np.int32)


class Ours:
    """The engine's sampler, adapters included."""

    def __init__(self, folder: Path) -> None:
        from tinsmith.engine.commands import LoraSpec
        from tinsmith.engine.model.base import BaseModel
        from tinsmith.engine.runs import Run
        from tinsmith.engine.sampler import Sampler

        self.model = BaseModel("bench/model", str(folder), torch.device("cpu"), torch.bfloat16)
        self.sampler = Sampler(self.model, 1 << 30)
        self.adapters = [Run.create(f"r{i}", self.model, LoraSpec(rank=32, seed=i)).weights for i in range(8)]
        self.calls = 0

    def run(self, count: int, adapters: int = 0) -> None:
        """`count` sequences, on that many adapters in turns (0: the base model)."""
        from tinsmith.engine.commands import Done, Reply, Sample, SampleParams

        self.calls += 1
        replies: list[Reply] = []
        for i, prompt in enumerate(prompts(count, self.calls)):
            params = SampleParams(seed=i, max_tokens=OUTPUT, stop=())
            command = Sample(f"{self.calls}:{i}", "bench/model", None, prompt.tobytes(), params)
            self.sampler.add(command, self.adapters[i % adapters] if adapters else None, replies.append)
        while self.sampler.step():
            pass
        assert len(replies) == count
        assert all(isinstance(r, Done) for r in replies), replies

    def prefix(self, runs: int) -> tuple[float, float, int]:
        """Seconds to the first token of a prompt of 512 that is new, and of one that was just sampled from;
        how many of 16 samples' prompt tokens were computed."""
        from tinsmith.engine.commands import Done, Reply, Sample, SampleParams

        def first(prompt: np.ndarray, count: int = 1) -> tuple[float, int]:
            self.calls += 1
            replies: list[Reply] = []
            params = SampleParams(seed=1, max_tokens=1, stop=())
            name, text = f"p{self.calls}", prompt.tobytes()
            start = time.perf_counter()
            self.sampler.add(
                Sample(name, "bench/model", None, text, params, num_samples=count), None, replies.append
            )
            while not replies:
                self.sampler.step()
            assert isinstance(replies[0], Done), replies
            return time.perf_counter() - start, replies[0].usage["prefill"]

        cold, warm = [], []
        for i in range(2 * runs + 1):
            prompt = np.random.default_rng(1000 + i).integers(0, 8192, 512).astype(np.int32)
            cold.append(first(prompt)[0])
            warm.append(first(prompt)[0])
        fresh = np.random.default_rng(7).integers(0, 8192, 512).astype(np.int32)
        computed = first(fresh, 16)[1]
        return sorted(cold)[runs], sorted(warm)[runs], computed


def generate(folder: Path, count: int, runs: int) -> float:
    """Seconds of transformers' generate on the same batch."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.from_numpy(prompts(count, 0).astype(np.int64))

    def work() -> None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=OUTPUT,
            do_sample=True,
            top_k=0,
            eos_token_id=None,
            pad_token_id=0,
        )

    return median_time(work, runs)


class Floor:
    """What the machine's own rates allow."""

    def __init__(self, ours: Ours) -> None:
        self.flops, self.reads = gemm_rate(torch.bfloat16), read_rate()
        weights = [p for p in ours.model.module.parameters() if p.dim() == 2][1:]  # all but the embedding
        self.weights = sum(p.numel() for p in weights)
        self.adapter = sum(x.numel() for x in ours.adapters[0].tensors().values())

    def step_bytes(self, adapters: int) -> int:
        """Read by every step, bf16."""
        return 2 * (self.weights + adapters * self.adapter)

    def seconds(self, count: int, adapters: int) -> float:
        """Of `count` sequences."""
        of_token = 2 * (self.weights + (self.adapter if adapters else 0))
        prompts = count * PROMPT * of_token / self.flops
        step = max(count * of_token / self.flops, self.step_bytes(adapters) / self.reads)
        return prompts + (OUTPUT - 1) * step


def batches(ours: Ours, folder: Path, runs: int) -> list[Target]:
    """Batches of 1 and 16, and adapters, against generate and the floor; prints the table."""
    floor = Floor(ours)
    rows = [("sequences", "adapters", "ours tok/s", "generate tok/s", "ratio", "floor tok/s", "of floor")]
    speed: dict[tuple[int, int], float] = {}
    base: dict[int, float] = {}
    targets: list[Target] = []
    for count, adapters in ((1, 0), (16, 0), (16, 1), (16, 8)):
        seconds = median_time(lambda c=count, a=adapters: ours.run(c, a), runs)  # type: ignore[misc]
        if count not in base:
            base[count] = generate(folder, count, runs)
        limit = floor.seconds(count, adapters)
        mine, theirs, most = (count * OUTPUT / s for s in (seconds, base[count], limit))
        speed[count, adapters] = mine
        if adapters == 0:
            name = f"sample, batch {count}: times generate"
            targets.append(Target(3, name, 4 if count == 16 else 2, mine / theirs))
        if (count, adapters) == (16, 0):
            targets.append(Target(3, "sample, batch 16: of floor", 0.6, mine / most))
        figures = f"{mine:.0f}", f"{theirs:.0f}", f"{mine / theirs:.2f}", f"{most:.0f}", f"{mine / most:.0%}"
        rows.append((str(count), str(adapters), *figures))
    name = "sample, 8 adapters in a batch of 16: of one's speed"
    targets.append(Target(3, name, 0.85, speed[16, 8] / speed[16, 1]))
    print(table(rows) + "\n")
    one, eight = (floor.step_bytes(n) / 1e6 for n in (1, 8))
    print(
        f"bf16 GEMM {floor.flops / 1e9:.0f} GFLOP/s, reading {floor.reads / 1e9:.0f} GB/s. A step reads "
        f"{one:.0f} MB with one adapter, {eight:.0f} MB with eight, which alone takes "
        f"{one / floor.reads * 1e9:.2f} and {eight / floor.reads * 1e9:.2f} ms\n"
    )
    return targets


def prefix(ours: Ours, runs: int) -> list[Target]:
    """A shared prompt of 512."""
    cold, warm, computed = ours.prefix(runs)
    first, again = cold * 1e3, warm * 1e3
    print(f"First token of a prompt of 512: {first:.1f} ms, {again:.1f} ms when the cache knows it\n")
    return [
        Target(3, "sample, time to first token of a known prefix of 512: times faster", 5, cold / warm),
        Target(3, "sample, prompt of 512 for 16 samples: tokens computed", 512, computed, most=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--part", choices=("batches", "prefix"), help="that part alone")
    parser.add_argument("--json", type=Path, help="where to write the targets")
    args = parser.parse_args()
    runs = 1 if args.quick else 3
    targets: list[Target] = []
    with tempfile.TemporaryDirectory() as name:
        folder = make_model(Path(name))
        ours = Ours(folder)
        print(machine() + "\n")
        if args.part != "prefix":
            targets += batches(ours, folder, runs)
        if args.part != "batches":
            targets += prefix(ours, runs)
    print(Target.table(targets))
    write(args.json, targets)


if __name__ == "__main__":
    with_surroundings()
    started = time.time()
    main()
    print(f"\n{time.time() - started:.0f} s")
