"""Training throughput in the engine against transformers + PEFT, and peak memory of a step.

    python bench/train.py [--quick]

A Qwen3-shaped model of 33.6 M parameters in bf16, LoRA of rank 32 on every linear layer; a step is
forward, backward and AdamW. The floor is the step's matrix products at the measured GEMM rate.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import gemm_rate, machine, make_model, median_time, peak_memory, table

CASES = {
    "8 x 512": [512] * 8,
    "2 x 2048": [2048] * 2,
    "ragged 16..1024": [16, 1024, 64, 700, 128, 300, 32, 900],
}


def sequences(lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 8192, n + 1).tolist() for n in lengths]


def ours(folder: Path, lengths: list[int], runs: int) -> float:
    """Seconds of a step of the engine, decoding of the request and encoding of the result included."""
    from tinsmith.engine.commands import (
        AdamParams,
        CreateAdapter,
        Done,
        EngineConfig,
        ForwardBackward,
        LoraSpec,
        ModelSource,
        OptimStep,
        Reply,
    )
    from tinsmith.engine.engine import Engine
    from tinsmith.wire import tinsmith_pb2 as pb

    engine = Engine(
        EngineConfig((ModelSource("bench/model", str(folder)),), str(folder / "spill"), "cpu", "bf16")
    )
    message = pb.ForwardBackwardRequest(model_id="r", seq_id=1, loss_fn="cross_entropy")
    for ids in sequences(lengths):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.asarray(ids[:-1], np.int32).tobytes()
        target = datum.loss_fn_inputs["target_tokens"]
        target.dense, target.dtype = np.asarray(ids[1:], np.int64).tobytes(), pb.DTYPE_INT64
        target.shape.append(len(ids) - 1)
    body = message.SerializeToString()

    def step() -> None:
        replies: list[Reply] = []
        engine.submit(ForwardBackward("r", 1, body), replies.append)
        engine.submit(OptimStep("r", 2, AdamParams()), replies.append)
        while len(replies) < 2:
            engine.step()
        assert all(isinstance(r, Done) for r in replies), replies

    engine.submit(CreateAdapter("r", "bench/model", LoraSpec(rank=32, seed=0)), lambda _: None)
    return median_time(step, runs)


def peft(folder: Path, lengths: list[int], runs: int) -> float:
    """Seconds of the same step in the loop that a user would write, one padded batch."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    model = get_peft_model(base, LoraConfig(r=32, lora_alpha=32, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    labels = torch.full((len(lengths), longest), -100)
    for i, s in enumerate(sequences(lengths)):
        ids[i, : len(s) - 1] = torch.tensor(s[:-1])
        labels[i, : len(s) - 1] = torch.tensor(s[1:])
    mask = (labels != -100).long()

    def step() -> None:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), reduction="sum"
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return median_time(step, runs)


def flops(lengths: list[int]) -> float:
    """Matrix products of a step: forward and the gradient of the inputs through the frozen weights, all
    three products of the adapters, causal attention forward and backward."""
    hidden, layers, inner, vocab, rank = 512, 8, 1536, 8192, 32
    shapes = [
        (512, 512),
        (512, 256),
        (512, 256),
        (512, 512),
        (512, inner),
        (512, inner),
        (inner, 512),
    ] * layers
    shapes.append((hidden, vocab))
    base = sum(i * o for i, o in shapes)
    lora = sum(rank * (i + o) for i, o in shapes)
    attention = sum(n * n / 2 * hidden * 2 * 2 * 3.5 * layers for n in lengths)
    return sum(lengths) * (2 * 2 * base + 3 * 2 * lora) + attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first case only, fewer runs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    runs = 3 if args.quick else 5
    if args.one:  # a process of its own, so that peak memory is that of one side alone
        side, case = args.one.split(":")
        before = peak_memory()
        seconds = {"ours": ours, "peft": peft}[side](args.folder, CASES[case], runs)
        print(f"RESULT {seconds} {peak_memory() - before}")
        return
    rate = gemm_rate(torch.bfloat16)
    rows = [("step", "ours tok/s", "PEFT tok/s", "ratio", "floor tok/s", "of floor", "peak MB ours / PEFT")]
    with tempfile.TemporaryDirectory() as name:
        folder = make_model(Path(name))
        for case in list(CASES)[: 1 if args.quick else None]:
            tokens = sum(CASES[case])
            result = {}
            for side in ("ours", "peft"):
                command = [sys.executable, __file__, "--one", f"{side}:{case}", "--folder", str(folder)]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                line = next(x for x in out.splitlines() if x.startswith("RESULT"))
                result[side] = [float(x) for x in line.split()[1:]]
            mine, theirs = (tokens / result[s][0] for s in ("ours", "peft"))
            floor = tokens / (flops(CASES[case]) / rate)
            memory = " / ".join(f"{result[s][1] / 2**20:.0f}" for s in ("ours", "peft"))
            rows.append(
                (
                    case,
                    f"{mine:.0f}",
                    f"{theirs:.0f}",
                    f"{mine / theirs:.2f}",
                    f"{floor:.0f}",
                    f"{mine / floor:.0%}",
                    memory,
                )
            )
    print(machine())
    print(f"bf16 GEMM {rate / 1e9:.0f} GFLOP/s\n")
    print(table(rows))


if __name__ == "__main__":
    main()
