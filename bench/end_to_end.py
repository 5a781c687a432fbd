"""What is left of the engine's throughput behind HTTP and the SDK, and how soon weights can be sampled.

    python bench/end_to_end.py [--quick] [--json FILE]

The model of bench/train.py. A training step of 8 x 512 tokens (forward_backward, optim_step, pipelined) and
16 sequences of 64 + 128 tokens, by the SDK against a server, and the same commands on an engine in this
process. Then save_weights_and_get_sampling_client with its first token, against a first token alone, on this
model and on one a tenth its size.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

from common import Target, machine, make_model, median_time, table, with_surroundings, write
from engine_runs import MODEL, RANK, Runs, body, sequences
from serving import server

LENGTHS = [512] * 8
PROMPT, OUTPUT, BATCH = 64, 128, 16
SMALL = {"hidden": 256, "layers": 2, "inner": 512}


def by_sdk(folder: Path, runs: int, *, only_publish: bool = False) -> dict[str, float]:
    """Seconds of each operation through the SDK."""
    import tinker
    from tinker import types

    flags = ("--model", f"{MODEL}={folder}", "--dtype", "bf16", "--device", "cpu")
    with server(*flags) as (url, key, _), tinker.ServiceClient(base_url=url, api_key=key) as service:
        run = service.create_lora_training_client(MODEL, rank=RANK)
        data = [
            types.Datum(
                model_input=types.ModelInput.from_ints(ids[:-1]),
                loss_fn_inputs={"target_tokens": types.TensorData(data=ids[1:], dtype="int64")},
            )
            for ids in sequences([16] if only_publish else LENGTHS)
        ]
        prompts = [types.ModelInput.from_ints(ids) for ids in sequences([PROMPT - 1] * BATCH)]
        adam = types.AdamParams(learning_rate=1e-5)
        sampler = run.save_weights_and_get_sampling_client()
        many = types.SamplingParams(max_tokens=OUTPUT, stop=[], seed=1)
        one = types.SamplingParams(max_tokens=1, stop=[], seed=1)

        def train() -> None:
            loss, update = run.forward_backward(data, "cross_entropy"), run.optim_step(adam)
            loss.result()
            update.result()

        def sample() -> None:
            for future in [sampler.sample(prompt, 1, many) for prompt in prompts]:
                future.result()

        def first_token(client: tinker.SamplingClient) -> None:
            client.sample(prompts[0], 1, one).result()

        def publish() -> float:
            """With weights that are new each time."""
            train()
            start = time.perf_counter()
            first_token(run.save_weights_and_get_sampling_client())
            return time.perf_counter() - start

        found: dict[str, float] = {}
        if not only_publish:
            found |= {"train": median_time(train, runs, 2), "sample": median_time(sample, runs, 2)}
        found["first token"] = median_time(lambda: first_token(sampler), 20, 5)
        found["publish"] = sorted(publish() for _ in range(7))[3]
        return found


def by_engine(folder: Path, runs: int) -> dict[str, float]:
    """Seconds of the same commands on an engine in this process."""
    import numpy as np

    from tinsmith.engine.commands import Done, Reply, Sample, SampleParams

    engine, request = Runs(folder, 1), body(LENGTHS)
    calls = iter(range(1_000_000))

    def sample() -> None:
        replies: list[Reply] = []
        for ids in sequences([PROMPT - 1] * BATCH):
            prompt = np.asarray(ids, np.int32).tobytes()
            params = SampleParams(seed=1, max_tokens=OUTPUT, stop=())
            engine.engine.submit(Sample(f"s{next(calls)}", MODEL, "w", prompt, params), replies.append)
        while len(replies) < BATCH:
            engine.engine.step()
        assert all(isinstance(r, Done) for r in replies), replies

    train = median_time(lambda: engine.step(request), runs, 2)
    engine.publish("w")
    return {"train": train, "sample": median_time(sample, runs, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--json", type=Path, help="where to write the targets")
    args = parser.parse_args()
    runs = 3 if args.quick else 7
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = make_model(Path(name) / "large")
        small = make_model(Path(name) / "small", **SMALL)
        inside, outside = by_engine(folder, runs), by_sdk(folder, runs)
        other = by_sdk(small, runs, only_publish=True)
    tokens = {"train": sum(LENGTHS), "sample": BATCH * OUTPUT}
    rows = [("operation", "in the engine tok/s", "through the SDK tok/s", "of it")]
    targets = []
    for what, count in tokens.items():
        share = inside[what] / outside[what]
        rows.append((what, f"{count / inside[what]:.0f}", f"{count / outside[what]:.0f}", f"{share:.0%}"))
        targets.append(Target(7, f"{what} through the SDK: of the engine's throughput", 0.9, share))
    print(machine() + "\n")
    print(table(rows) + "\n")
    rows = [("model", "first token ms", "save weights, client and first token ms", "above it ms")]
    for label, found in (("33.6 M", outside), ("a tenth of it", other)):
        above = 1e3 * (found["publish"] - found["first token"])
        figures = (1e3 * found["first token"], 1e3 * found["publish"], above)
        rows.append((label, *(f"{x:.1f}" for x in figures)))
        name = f"weights to sampler, {label}: ms above the round trip"
        targets.append(Target(4, name, 20, above, most=True))
    print(table(rows) + "\n")
    print(Target.table(targets))
    write(args.json, targets)


if __name__ == "__main__":
    with_surroundings()
    main()
