"""Reinforcement learning with a verifiable reward: the model learns to add from its own answers.

    TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-... python examples/rl.py

Each step samples a group of answers to each of a few sums, rewards the right ones, and takes one
importance-sampling step on the advantages: reward minus the group's mean.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import tinker
from tinker import types

END = "<|im_end|>"


def problem(rng: random.Random) -> tuple[str, str]:
    x, y = rng.randint(0, 99), rng.randint(0, 99)
    return f"<|im_start|>user\nWhat is {x} + {y}?{END}\n<|im_start|>assistant\n", str(x + y)


def reward(tokenizer: Any, tokens: list[int], answer: str) -> float:
    """1 for exactly the right answer, ended in order; else 0."""
    return float(tokenizer.decode(tokens).strip() == answer + END)


def rollouts(
    sampler: tinker.SamplingClient, tokenizer: Any, problems: list[tuple[str, str]], group: int, seed: int
) -> list[list[tuple[list[int], list[int], list[float], float]]]:
    """For each problem `group` answers: (prompt tokens, answer tokens, their logprobs, reward)."""
    prompts = [tokenizer.encode(p, add_special_tokens=False) for p, _ in problems]
    futures = [
        sampler.sample(
            types.ModelInput.from_ints(prompt),
            num_samples=group,
            sampling_params=types.SamplingParams(max_tokens=8, temperature=1.0, seed=seed + i),
        )
        for i, prompt in enumerate(prompts)
    ]
    return [
        [
            (prompt, list(s.tokens), list(s.logprobs or []), reward(tokenizer, list(s.tokens), answer))
            for s in future.result().sequences
        ]
        for prompt, future, (_, answer) in zip(prompts, futures, problems, strict=True)
    ]


def datum(prompt: list[int], answer: list[int], logprobs: list[float], advantage: float) -> types.Datum:
    """Inputs and targets shifted by one; the prompt has no advantage."""
    tokens, before = prompt + answer, len(prompt) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * before + logprobs,
            "advantages": [0.0] * before + [advantage] * len(answer),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tinsmith/tin-5m")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--problems", type=int, default=24, help="sums in a step")
    parser.add_argument("--group", type=int, default=8, help="answers to each sum")
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--held-out", type=int, default=96, help="sums that the reward is measured on")
    parser.add_argument("--log", type=Path, help="a JSONL file of what happens at each step")
    args = parser.parse_args()
    log: list[dict[str, float]] = []
    with tinker.ServiceClient() as service:
        run = service.create_lora_training_client(args.model, rank=32, seed=0)
        tokenizer = run.get_tokenizer()
        held_out = [problem(random.Random(10_000 + i)) for i in range(args.held_out)]
        rng = random.Random(1)

        def evaluate(sampler: tinker.SamplingClient) -> float:
            groups = rollouts(sampler, tokenizer, held_out, 4, seed=1)
            return sum(r for g in groups for *_, r in g) / (4 * len(groups))

        sampler = run.save_weights_and_get_sampling_client()
        before = evaluate(sampler)
        print(f"held-out reward before: {before:.3f}", flush=True)
        for step in range(1, args.steps + 1):
            groups = rollouts(
                sampler, tokenizer, [problem(rng) for _ in range(args.problems)], args.group, 1000 * step
            )
            mean = sum(r for g in groups for *_, r in g) / (args.problems * args.group)
            data = []
            for group in groups:
                baseline = sum(r for *_, r in group) / len(group)
                # A group of equals teaches nothing.
                data += [datum(p, a, lp, r - baseline) for p, a, lp, r in group if r != baseline]
            if data:
                loss = run.forward_backward(data, "importance_sampling")
                update = run.optim_step(types.AdamParams(learning_rate=args.lr))
                loss.result()
                update.result()
            sampler = run.save_weights_and_get_sampling_client()
            log.append({"step": step, "reward": mean})
            print(f"step {step:3d}  reward {mean:.3f}", flush=True)
        after = evaluate(sampler)
        run.save_state("added").result()
    print(f"held-out reward {before:.3f} -> {after:.3f}")
    if args.log:
        log.append({"step": args.steps, "held_out_before": before, "held_out_after": after})
        args.log.write_text("".join(json.dumps(row) + "\n" for row in log))


if __name__ == "__main__":
    main()
