"""Training throughput in the engine against transformers + PEFT, and peak memory of a step.

    python bench/train.py [--quick] [--only CASE ...] [--json FILE]

A Qwen3-shaped model of 33.6 M parameters in bf16, LoRA of rank 32 on every linear layer; a step is forward,
backward and AdamW. First one run, then eight runs with 128 tokens each, together in the engine and one after
the other in PEFT; then memory. The floor is the step's arithmetic at the rate of a bf16 product of two
matrices, measured in the same run, and, for the optimizer, its bytes at the measured rate of a copy.

Every side is a process of its own. Ours has the settings that the server gives its engine's process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import Target, copy_rate, gemm_rate, machine, make_model, median_time, peak_memory, table, write
from engine_runs import RANK, Runs, body, sequences

CASES = {
    "8 x 512": [512] * 8,
    "2 x 2048": [2048] * 2,
    "ragged 16..1024": [16, 32, 64, 128, 256, 512, 1024, 16, 32, 64, 128, 256],
}
WANTED = {"8 x 512": 2.0, "2 x 2048": 2.0, "ragged 16..1024": 4.0}
MANY = "8 runs of 1 x 128"
IDLE = "beside idle"  # one run of 128 tokens, alone and beside seven idle ones
HIDDEN, LAYERS, INNER, VOCAB = 512, 8, 1536, 8192
LINEAR = [(512, 512), (512, 256), (512, 256), (512, 512), (512, INNER), (512, INNER), (INNER, 512)] * LAYERS


def ours(folder: Path, case: str, runs: int) -> float:
    """Seconds of a step of the engine."""
    many = case == MANY
    both = Runs(folder, 8 if many else 1)
    request = body([128] if many else CASES[case])
    return median_time(lambda: both.step(request), runs, 2)


def one_of_eight(folder: Path, case: str, runs: int) -> tuple[float, float]:
    """Seconds of a step of one run alone, and of the same beside seven idle ones."""
    alone, beside, request = Runs(folder, 1), Runs(folder, 8), body([128])
    for each in (alone, beside):
        each.step(request)
    times: list[list[float]] = [[], []]
    for _ in range(4 * runs):  # in turns, so that the machine's moods meet both
        for i, each in enumerate((alone, beside)):
            times[i].append(median_time(lambda e=each: e.step(request, busy=1), 3, 0))  # type: ignore[misc]
    return min(times[0]), min(times[1])


def peft(folder: Path, case: str, runs: int) -> float:
    """Seconds of the same in the loop that a user would write: one padded batch, adapter after adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    many = case == MANY
    lengths = [128] if many else CASES[case]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=targets)
    names = [f"a{i}" for i in range(8 if many else 1)]
    model = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    optimizers = {
        name: torch.optim.AdamW([p for n, p in model.named_parameters() if f".{name}." in n], lr=1e-4)
        for name in names
    }
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    labels = torch.full((len(lengths), longest), -100)
    for i, s in enumerate(sequences(lengths)):
        ids[i, : len(s) - 1] = torch.tensor(s[:-1])
        labels[i, : len(s) - 1] = torch.tensor(s[1:])
    mask = (labels != -100).long()

    def step() -> None:
        for name, optimizer in optimizers.items():
            if many:
                model.set_adapter(name)
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
    shapes = [*LINEAR, (HIDDEN, VOCAB)]
    base = sum(i * o for i, o in shapes)
    lora = sum(RANK * (i + o) for i, o in shapes)
    attention = sum(n * n / 2 * HIDDEN * 2 * 2 * 3.5 * LAYERS for n in lengths)
    return sum(lengths) * (2 * 2 * base + 3 * 2 * lora) + attention


def optimizer_bytes() -> int:
    """What a step of AdamW must read and write: weights and two moments, each both ways, and the gradient,
    which was written and is read."""
    return 8 * 4 * sum(RANK * (i + o) for i, o in [*LINEAR, (HIDDEN, VOCAB)])


def needed_bytes(tokens: int, longest: int) -> dict[str, int]:
    """What a step must hold at its peak: weights; the adapter's state (weights, two moments, gradient in
    fp32, both packed copies in bf16); and what the backward pass reads again, in bf16 but for the softmax's
    two numbers a row: per layer the inputs of both norms, of the linear layers, q, k, v before and after
    their norms and rotation, attention's output, gate and up."""
    weights = 2 * (sum(i * o for i, o in LINEAR) + 2 * HIDDEN * VOCAB)
    lora = sum(RANK * (i + o) for i, o in [*LINEAR, (HIDDEN, VOCAB)])
    per_layer = 2 * (4 * HIDDEN + 3 * 768 + 256 + 512 + 3 * INNER + 7 * RANK) + 8 * 8
    return {"weights": weights, "adapter": (4 * 4 + 2 * 2) * lora, "activations": tokens * per_layer * LAYERS}


SIDES = {"ours": ours, "peft": peft, "one": one_of_eight}


def measure(side: str, case: str, folder: Path, runs: int) -> list[float]:
    """Seconds, and the bytes by which the process's peak grew."""
    from tinsmith.engine.process import surroundings

    environment = {**os.environ, **(surroundings(os.environ) if side != "peft" else {})}
    command = [sys.executable, __file__, "--one", f"{side}:{case}", "--folder", str(folder)]
    command += ["--runs", str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = [x for x in done.stdout.splitlines() if x.startswith("RESULT")]
    if not found:
        raise SystemExit(f"{side} {case} failed:\n{done.stderr[-2000:]}")
    return [float(x) for x in found[0].split()[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first case only, fewer runs")
    names = [*CASES, MANY, IDLE]
    parser.add_argument("--only", nargs="+", choices=names, metavar="CASE", help=f"of {', '.join(names)}")
    parser.add_argument("--json", type=Path, help="where to write the targets")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        side, case = args.one.split(":")
        before = peak_memory()
        result = SIDES[side](args.folder, case, args.runs)
        numbers = result if isinstance(result, tuple) else (result,)
        print("RESULT", *numbers, peak_memory() - before)
        return
    runs = 3 if args.quick else 5
    chosen = args.only or [*list(CASES)[: 1 if args.quick else None], MANY, IDLE]
    rate, copied = gemm_rate(torch.bfloat16), copy_rate()
    rows = [("step", "ours tok/s", "PEFT tok/s", "ratio", "floor tok/s", "of floor")]
    memory = [("step", "ours MB", "PEFT MB", "needed MB", "ours / needed")]
    targets: list[Target] = []
    with tempfile.TemporaryDirectory() as name:
        folder = make_model(Path(name))
        for case in [each for each in chosen if each != IDLE]:
            lengths = CASES.get(case, [128] * 8)
            tokens = sum(lengths)
            (mine, peak), (theirs, their_peak) = (measure(s, case, folder, runs) for s in ("ours", "peft"))
            least = flops(lengths) / rate + (8 if case == MANY else 1) * optimizer_bytes() / copied
            rows.append(
                (
                    case,
                    f"{tokens / mine:.0f}",
                    f"{tokens / theirs:.0f}",
                    f"{theirs / mine:.2f}",
                    f"{tokens / least:.0f}",
                    f"{least / mine:.0%}",
                )
            )
            if case == MANY:
                targets.append(Target(2, f"train, {case}: times PEFT one after another", 2.2, theirs / mine))
                targets.append(Target(2, f"train, {case}: of floor, optimizer included", 0.65, least / mine))
                continue
            targets.append(Target(1, f"train, {case}: times PEFT", WANTED[case], theirs / mine))
            if case == "8 x 512":
                targets.append(Target(1, f"train, {case}: of floor", 0.70, least / mine))
            need = sum(needed_bytes(tokens, max(lengths)).values())
            megabytes = [f"{x / 2**20:.0f}" for x in (peak, their_peak, need)]
            memory.append((case, *megabytes, f"{peak / need:.2f}"))
            if case == "8 x 512":
                name = f"memory of a step, {case}: times what is needed"
                targets.append(Target(5, name, 1.3, peak / need, most=True))
        if IDLE in chosen:
            alone, beside, _ = measure("one", MANY, folder, runs)
            name = "train, one run beside seven idle ones: times alone"
            targets.append(Target(2, name, 1.03, beside / alone, most=True))
            idle = f"{alone * 1e3:.1f} ms alone, {beside * 1e3:.1f} ms beside seven idle ones"
    print(machine())
    print(f"bf16 GEMM {rate / 1e9:.0f} GFLOP/s, copy {copied / 1e9:.1f} GB/s read and written\n")
    for found in (rows, memory):
        if len(found) > 1:
            print(table(found) + "\n")
    if IDLE in chosen:
        print(f"One run of 128 tokens: {idle}\n")
    print(Target.table(targets))
    write(args.json, targets)


if __name__ == "__main__":
    main()
