"""What an operation takes through the official SDK and HTTP, beside what the engine itself needs for it.

    python bench/latency.py

Starts a server with the model that ships, warms it up, and measures each operation one after the other;
then the same commands on an engine in this process. The difference is what client, HTTP, log and process
boundary add. The target: less than 10 ms for an optim_step.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import machine, table
from serving import server

MODEL = "tinsmith/tin-5m"
FOLDER = Path(__file__).resolve().parents[1] / "src" / "tinsmith" / "assets" / "models" / "tin-5m"
TOKENS = list(range(300, 317))
RUNS = 60


def milliseconds(work: Callable[[], object], runs: int = RUNS) -> tuple[float, float]:
    """(median, 95th percentile) of `work`."""
    for _ in range(5):
        work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1000)
    return float(np.percentile(times, 50)), float(np.percentile(times, 95))


def through_the_sdk() -> dict[str, tuple[float, float]]:
    import tinker
    from tinker import types

    prompt = types.ModelInput.from_ints(TOKENS)
    one = types.SamplingParams(max_tokens=1, temperature=0.0)
    with server() as (url, key, _), tinker.ServiceClient(base_url=url, api_key=key) as service:
        run = service.create_lora_training_client(MODEL, rank=32)
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(TOKENS[:-1]),
            loss_fn_inputs={"target_tokens": TOKENS[1:], "weights": [1.0] * (len(TOKENS) - 1)},
        )
        adam = types.AdamParams(learning_rate=1e-5)
        base = service.create_sampling_client(base_model=MODEL)

        def both() -> None:
            loss, update = run.forward_backward([datum], "cross_entropy"), run.optim_step(adam)
            loss.result()
            update.result()

        def publish() -> None:  # the SDK returns the client at once: what it takes shows in the first sample
            run.save_weights_and_get_sampling_client().sample(prompt, 1, one).result()

        return {
            "optim_step, nothing accumulated": milliseconds(lambda: run.optim_step(adam).result()),
            "forward_backward, 16 tokens": milliseconds(
                lambda: run.forward_backward([datum], "cross_entropy").result()
            ),
            "forward_backward + optim_step, pipelined": milliseconds(both),
            "sample, 1 token": milliseconds(lambda: base.sample(prompt, 1, one).result()),
            "save_weights_and_get_sampling_client + its first token": milliseconds(publish),
        }


def in_the_engine() -> dict[str, tuple[float, float]]:
    from tinsmith.engine import commands as c
    from tinsmith.engine.engine import Engine
    from tinsmith.wire import tinsmith_pb2 as pb

    spill = tempfile.mkdtemp()
    engine = Engine(c.EngineConfig((c.ModelSource(MODEL, str(FOLDER)),), spill))
    message = pb.ForwardBackwardRequest(model_id="r", seq_id=1, loss_fn="cross_entropy")
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.asarray(TOKENS[:-1], np.int32).tobytes()
    target = datum.loss_fn_inputs["target_tokens"]
    target.dense, target.dtype = np.asarray(TOKENS[1:], np.int64).tobytes(), pb.DTYPE_INT64
    target.shape.append(len(TOKENS) - 1)
    body = message.SerializeToString()

    def tell(*told: c.Command) -> None:
        replies: list[c.Reply] = []
        for command in told:
            engine.submit(command, replies.append)
        while len(replies) < len(told):
            engine.step()
        assert all(isinstance(r, c.Done) for r in replies), replies

    number = iter(range(1_000_000))
    forward, adam = c.ForwardBackward("r", 1, body), c.OptimStep("r", 2, c.AdamParams(1e-5))

    def sample(sampler: str | None = None) -> c.Sample:
        params = c.SampleParams(seed=1, max_tokens=1, temperature=0.0)
        prompt = np.asarray(TOKENS, np.int32).tobytes()
        return c.Sample(f"s{next(number)}", MODEL, sampler, prompt, params)

    def publish() -> None:
        name = f"w{next(number)}"
        tell(c.Publish("r", 3, name))  # a sample waits for nobody: the weights must be there
        tell(sample(name))

    tell(c.CreateAdapter("r", MODEL, c.LoraSpec(rank=32, seed=0)))
    return {
        "optim_step, nothing accumulated": milliseconds(lambda: tell(adam)),
        "forward_backward, 16 tokens": milliseconds(lambda: tell(forward)),
        "forward_backward + optim_step, pipelined": milliseconds(lambda: tell(forward, adam)),
        "sample, 1 token": milliseconds(lambda: tell(sample())),
        "save_weights_and_get_sampling_client + its first token": milliseconds(publish),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    sdk, engine = through_the_sdk(), in_the_engine()
    rows = [("operation", "SDK p50 ms", "SDK p95 ms", "engine p50 ms", "added ms")]
    for name, (median, high) in sdk.items():
        own = engine[name][0]
        rows.append((name, f"{median:.1f}", f"{high:.1f}", f"{own:.1f}", f"{median - own:.1f}"))
    print(machine() + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
