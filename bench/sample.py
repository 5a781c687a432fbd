"""Sampling throughput in the engine against transformers' generate.

    python bench/sample.py [--quick] [--json FILE]

The same Qwen3-shaped model of 33.6 M parameters in bf16; 64 prompt tokens and 128 sampled ones a sequence.
The floor is the bare products of a step with all weights, by torch, as often as tokens are sampled. Then a
prompt of 512 tokens that 16 samples share: the time to its first token, and again when the cache knows it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import Target, machine, make_model, median_time, table, write

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


def floor(model: object, count: int) -> float:
    """Seconds that the weights' products alone take for `count` rows, OUTPUT times."""
    weights = [p for p in model.module.parameters() if p.dim() == 2][1:]  # type: ignore[attr-defined]
    inputs = {w.shape[1]: torch.randn(count, w.shape[1], dtype=w.dtype) for w in weights}

    def step() -> None:
        for w in weights:
            torch.nn.functional.linear(inputs[w.shape[1]], w)

    with torch.no_grad():
        return median_time(step, 20) * OUTPUT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--json", type=Path, help="where to write the targets")
    args = parser.parse_args()
    runs = 1 if args.quick else 3
    targets: list[Target] = []
    speed: dict[tuple[int, int], float] = {}
    rows = [("sequences", "adapters", "ours tok/s", "generate tok/s", "ratio", "floor tok/s", "of floor")]
    with tempfile.TemporaryDirectory() as name:
        folder = make_model(Path(name))
        ours = Ours(folder)
        base: dict[int, float] = {}
        for count, adapters in ((1, 0), (16, 0), (16, 1), (16, 8)):
            seconds = median_time(lambda c=count, a=adapters: ours.run(c, a), runs)  # type: ignore[misc]
            if count not in base:
                base[count] = generate(folder, count, runs)
            limit = floor(ours.model, count)
            mine, theirs, most = (count * OUTPUT / s for s in (seconds, base[count], limit))
            speed[count, adapters] = mine
            if adapters == 0:
                name = f"sample, batch {count}: times generate"
                targets.append(Target(3, name, 4 if count == 16 else 2, mine / theirs))
            if (count, adapters) == (16, 0):
                targets.append(Target(3, "sample, batch 16: of floor", 0.6, mine / most))
            rows.append(
                (
                    str(count),
                    str(adapters),
                    f"{mine:.0f}",
                    f"{theirs:.0f}",
                    f"{mine / theirs:.2f}",
                    f"{most:.0f}",
                    f"{mine / most:.0%}",
                )
            )
        cold, warm, computed = ours.prefix(runs)
    targets += [
        Target(3, "sample, 8 adapters in a batch of 16: of one's speed", 0.85, speed[16, 8] / speed[16, 1]),
        Target(3, "sample, time to first token of a known prefix of 512: times faster", 5, cold / warm),
        Target(3, "sample, prompt of 512 for 16 samples: tokens computed", 512, computed, most=True),
    ]
    print(machine() + "\n")
    print(table(rows) + "\n")
    print(
        f"First token of a prompt of 512: {cold * 1e3:.1f} ms, {warm * 1e3:.1f} ms when the cache knows it\n"
    )
    print(Target.table(targets))
    write(args.json, targets)


if __name__ == "__main__":
    started = time.time()
    main()
    print(f"\n{time.time() - started:.0f} s")
