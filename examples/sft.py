"""Supervised fine-tuning: teach the model to rotate a list, which it has never seen done.

    TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-... python examples/sft.py

"Rotate the list: red, tea, moon" -> "tea, moon, red". Held-out lists are of words that training never shows.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import tinker
from tinker import types

TRAIN = (
    "apple bread chair dog egg fish green house ice juice king lamp moon night paper queen river stone tree "
    "snow tea vase wind book cloud desk farm glass hat map pen road salt wall wolf horse duck tiger sun star"
).split()
HELD_OUT = "bird cat door earth fire gold hill ink jar key leaf milk nest".split()
END = "<|im_end|>"


def example(words: list[str], rng: random.Random) -> tuple[str, str]:
    """A prompt in the model's chat format, and the answer."""
    chosen = rng.sample(words, rng.randint(3, 5))
    question = f"Rotate the list: {', '.join(chosen)}"
    answer = ", ".join([*chosen[1:], chosen[0]])
    return f"<|im_start|>user\n{question}{END}\n<|im_start|>assistant\n", answer


def datum(tokenizer: Any, prompt: str, answer: str) -> types.Datum:
    before = tokenizer.encode(prompt, add_special_tokens=False)
    after = tokenizer.encode(answer + END, add_special_tokens=False)
    tokens = before + after
    weights = [0.0] * (len(before) - 1) + [1.0] * len(after)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},
    )


def accuracy(sampler: tinker.SamplingClient, tokenizer: Any, problems: list[tuple[str, str]]) -> float:
    """The share of greedy answers that are exactly right."""
    params = types.SamplingParams(max_tokens=48, temperature=0.0)
    futures = [
        sampler.sample(
            types.ModelInput.from_ints(tokenizer.encode(prompt, add_special_tokens=False)),
            num_samples=1,
            sampling_params=params,
        )
        for prompt, _ in problems
    ]
    outputs = [tokenizer.decode(list(f.result().sequences[0].tokens)).split(END)[0] for f in futures]
    return sum(o == answer for o, (_, answer) in zip(outputs, problems, strict=True)) / len(problems)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tinsmith/tin-5m")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--held-out", type=int, default=64, help="lists that accuracy is measured on")
    parser.add_argument("--log", type=Path, help="a JSONL file of what happens at each step")
    args = parser.parse_args()
    rng = random.Random(0)
    log: list[dict[str, float]] = []
    with tinker.ServiceClient() as service:
        run = service.create_lora_training_client(args.model, rank=32, seed=0)
        tokenizer = run.get_tokenizer()
        problems = [example(HELD_OUT, rng) for _ in range(args.held_out)]
        held_out = [datum(tokenizer, *p) for p in problems]
        count = sum(sum(d.loss_fn_inputs["weights"].data) for d in held_out)

        def evaluate(step: int) -> dict[str, float]:
            loss = run.forward(held_out, "cross_entropy")
            right = accuracy(run.save_weights_and_get_sampling_client(), tokenizer, problems)
            mean = loss.result().metrics["loss:sum"] / count
            row = {"step": step, "held_out_loss": mean, "held_out_accuracy": right}
            print(f"step {step:3d}  held-out loss {mean:.3f}  accuracy {right:.0%}", flush=True)
            return row

        log.append(evaluate(0))
        for step in range(1, args.steps + 1):
            batch = [datum(tokenizer, *example(TRAIN, rng)) for _ in range(args.batch)]
            tokens = sum(sum(d.loss_fn_inputs["weights"].data) for d in batch)
            # The loss is a sum: dividing the weights makes it a mean, whatever the batch.
            for d in batch:
                d.loss_fn_inputs["weights"] = types.TensorData(
                    data=[w / tokens for w in d.loss_fn_inputs["weights"].data], dtype="float32"
                )
            loss = run.forward_backward(batch, "cross_entropy")
            rate = args.lr * min(1.0, 1.5 * (1 - (step - 1) / args.steps))
            update = run.optim_step(types.AdamParams(learning_rate=rate))
            row = {"step": step, "loss": loss.result().metrics["loss:sum"]}
            update.result()
            if step % 20 == 0 or step == args.steps:
                row |= evaluate(step)
            elif step % 5 == 0:
                print(f"step {step:3d}  loss {row['loss']:.3f}", flush=True)
            log.append(row)
        path = run.save_state("rotated").result().path
    print(
        f"accuracy {log[0]['held_out_accuracy']:.0%} -> {log[-1]['held_out_accuracy']:.0%}; saved as {path}"
    )
    if args.log:
        args.log.write_text("".join(json.dumps(row) + "\n" for row in log))


if __name__ == "__main__":
    main()
