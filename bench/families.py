"""What every family costs here, beside transformers' own code on the same small model.

    python bench/families.py [--only NAME]

Small random models of the families that the tests know (tests/families.py), in bf16. Training: forward and
backward of 8 sequences of 32 to 256 tokens with adapters of rank 8 on everything, against transformers'
forward and backward through the frozen weights, sequence after sequence. Sampling: 8 sequences, 32 prompt
tokens and 64 sampled ones, against generate. The tables are those of docs/models.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from common import machine, median_time, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LARGER = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 1024, "vocab_size": 4096}
LENGTHS = [32, 256, 64, 128, 32, 256, 64, 128]
PROMPT, OUTPUT, BATCH = 32, 64, 8


def texts(lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, LARGER["vocab_size"], n + 1).tolist() for n in lengths]


def modules(slots: list) -> dict[str, str]:
    """The last parts of the slots' names, by group."""
    found: dict[str, dict[str, None]] = {"attn": {}, "mlp": {}, "unembed": {}}
    for slot in slots:
        *_, before, leaf = slot.name.split(".")
        found[slot.group][f"{before}.{leaf}" if slot.experts else leaf] = None
    return {group: ", ".join(names) for group, names in found.items()}


def ours(folder: Path) -> tuple[float, float, object]:
    """(training tokens/s, sampled tokens/s, the model)."""
    from tests.engine.test_sampler import run, sample
    from tests.engine.test_training import train
    from tests.engine.tiny import load, make_run, request
    from tinsmith.engine.exactness import settle
    from tinsmith.engine.model.checks import check
    from tinsmith.engine.sampler import Sampler

    model = load(folder, torch.bfloat16)
    check(model)
    settle([model], 32)
    trained, body = make_run(model), request(texts(LENGTHS))
    step = median_time(lambda: train(trained, body), 3)
    sampler = Sampler(model, 1 << 28)
    calls = iter(range(1_000_000))

    def draw() -> None:
        work = [
            (sample(f"s{next(calls)}", t[:-1], max_tokens=OUTPUT, stop=(), seed=i), None)
            for i, t in enumerate(texts([PROMPT] * BATCH))
        ]
        run(sampler, *work)

    return sum(LENGTHS) / step, BATCH * OUTPUT / median_time(draw, 3), model


def transformers(folder: Path) -> tuple[float, float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
    embed = model.get_input_embeddings()
    ids = [torch.tensor([t]) for t in texts(LENGTHS)]

    def step() -> None:
        for x in ids:
            inputs = embed(x[:, :-1]).requires_grad_(True)
            logits = model(inputs_embeds=inputs, use_cache=False).logits[0].float()
            torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="sum").backward()

    prompts = torch.tensor(texts([PROMPT] * BATCH))[:, :-1]

    def draw() -> None:
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=OUTPUT,
            do_sample=True,
            top_k=0,
            eos_token_id=None,
            pad_token_id=0,
        )

    return sum(LENGTHS) / median_time(step, 3), BATCH * OUTPUT / median_time(draw, 3)


def main() -> None:
    from tests import families
    from tests.engine.tiny import make_family

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="one family")
    only = parser.parse_args().only
    costs = [("family", "path", "train tok/s", "transformers", "ratio", "sample tok/s", "generate", "ratio")]
    names = [("family", "train_attn", "train_mlp", "train_unembed")]
    with tempfile.TemporaryDirectory() as root:
        for row, settings in families.FAMILIES.items():
            if (only and row != only) or "-" in row:
                continue
            folder = Path(root) / row
            make_family(row, "ForCausalLM", folder, {**settings, **LARGER})
            train, draw, model = ours(folder)
            their_train, their_draw = transformers(folder)
            costs.append(
                (
                    row,
                    model.way,  # type: ignore[attr-defined]
                    f"{train:.0f}",
                    f"{their_train:.0f}",
                    f"{train / their_train:.2f}",
                    f"{draw:.0f}",
                    f"{their_draw:.0f}",
                    f"{draw / their_draw:.2f}",
                )
            )
            groups = modules(model.slots)  # type: ignore[attr-defined]
            names.append((row, groups["attn"] or "-", groups["mlp"] or "-", groups["unembed"]))
            print(*costs[-1], file=sys.stderr, flush=True)
    print(machine() + "\n")
    print(table(costs) + "\n")
    print(table(names))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    started = time.time()
    main()
    print(f"\n{time.time() - started:.0f} s")
