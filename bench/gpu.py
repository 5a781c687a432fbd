"""A GPU's kernels: checked against fp64, timed, and set beside the device's limits and transformers + PEFT.

    python bench/gpu.py [--seconds N] [--only check,limits,train,peft,decode,generate,adapters,...]
    TRITON_INTERPRET=1 python bench/gpu.py --smoke     # without a GPU: a tiny model in Triton's interpreter

A random model of Qwen3-8B's shape is made on the device; kernels are compiled as they are first used.
Sections run one after the other; one that fails prints its error, and the rest go on. The table comes last,
in any case after --seconds: what is under way is broken off then, and the rest left out, by name.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from common import machine, median_time, table

SHAPE = {
    "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936, "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {
    **SHAPE, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 128, "vocab_size": 512, "max_position_embeddings": 512,
}  # fmt: skip
RANK = 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


@dataclass
class Bench:
    device: torch.device
    smoke: bool
    rows: list[tuple[str, ...]] = field(default_factory=list)
    rate: float = float("nan")  # FLOP/s of a bf16 product
    bandwidth: float = float("nan")  # bytes/s
    tokens: dict[str, float] = field(default_factory=dict)  # a second, by section
    _module: Any = None

    @property
    def lengths(self) -> list[int]:
        return [24, 40] if self.smoke else [2048] * 8

    def say(self, what: str, value: str, beside: str = "", target: str = "") -> None:
        self.rows.append((what, value, beside, target))
        print(f"  {what}: {value} {beside}", flush=True)

    def time(self, work: Callable[[], object], runs: int = 3) -> float:
        def timed() -> None:
            work()
            self.wait()

        return median_time(timed, 1 if self.smoke else runs)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def config(self) -> Any:
        from transformers import Qwen3Config

        return Qwen3Config(**(SMALL if self.smoke else SHAPE))

    def module(self, attention: str) -> Any:
        """A random model on the device, one at a time."""
        from transformers import AutoModelForCausalLM

        self.free()
        torch.manual_seed(0)
        with self.device, without_initialization():
            module = AutoModelForCausalLM.from_config(
                self.config(), dtype=torch.bfloat16, attn_implementation=attention
            )
            for p in module.parameters():
                p.data.normal_(0, 0.02) if p.dim() > 1 else p.data.fill_(1.0)
        module.generation_config.eos_token_id = None
        self._module = module
        return module

    def model(self) -> Any:
        from tinsmith.engine.model.base import BaseModel

        module = self.module("tinsmith")
        model = BaseModel.__new__(BaseModel)
        model._adopt("bench/model", "", module, None, self.device, torch.bfloat16, None)
        model.fingerprint = "bench"
        return model

    def free(self) -> None:
        self._module = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def without_initialization():  # type: ignore[no-untyped-def]
    """transformers' own initialization takes a while for eight billion numbers."""
    from transformers import PreTrainedModel

    before = PreTrainedModel.init_weights
    PreTrainedModel.init_weights = lambda self: self.tie_weights()
    try:
        yield
    finally:
        PreTrainedModel.init_weights = before


def check(bench: Bench) -> None:
    """Every kernel against its formula in fp64; torch's own attention where it would be taken."""
    from tinsmith.engine.kernels import flash
    from tinsmith.engine.kernels.trial import differences

    problem = differences(bench.device)
    bench.say("Triton kernels against fp64", problem or "all near")
    if bench.device.type == "cuda":
        for dim in (64, 128):
            for window, sinks in ((False, False), (True, True)):
                good = flash._works(bench.device, dim, window, sinks)
                what = f"torch's attention, heads of {dim}{', window, sinks' if window else ''}"
                bench.say(what, "near" if good else "not used")


def limits(bench: Bench) -> None:
    size = 256 if bench.smoke else 8192
    a, b = (torch.randn(size, size, device=bench.device).bfloat16() for _ in range(2))
    bench.rate = 2 * size**3 / bench.time(lambda: [torch.mm(a, b) for _ in range(10)], 5) * 10
    x = torch.empty((1 << 20) if bench.smoke else (4 << 30), dtype=torch.uint8, device=bench.device)
    y = torch.empty_like(x)
    bench.bandwidth = 2 * x.numel() / bench.time(lambda: y.copy_(x), 5)
    bench.say("bf16 product", f"{bench.rate / 1e12:.1f} TFLOP/s")
    bench.say("copy on the device", f"{bench.bandwidth / 1e12:.2f} TB/s")


def flops(bench: Bench) -> float:
    """Matrix products of a training step: forward and the inputs' gradient through frozen weights, three of
    the adapters, causal attention forward and backward."""
    c = bench.config()
    wide = c.num_attention_heads * c.head_dim
    kv = c.num_key_value_heads * c.head_dim
    shapes = [(c.hidden_size, wide), *[(c.hidden_size, kv)] * 2, (wide, c.hidden_size)]
    shapes += [(c.hidden_size, c.intermediate_size)] * 2 + [(c.intermediate_size, c.hidden_size)]
    shapes = shapes * c.num_hidden_layers + [(c.hidden_size, c.vocab_size)]
    base, lora = sum(i * o for i, o in shapes), sum(RANK * (i + o) for i, o in shapes)
    attention = sum(n * n / 2 * wide * 2 * 2 * 3.5 * c.num_hidden_layers for n in bench.lengths)
    return sum(bench.lengths) * (4 * base + 6 * lora) + attention


def _report_training(bench: Bench, name: str, seconds: float, remark: str = "") -> None:
    tokens = sum(bench.lengths)
    bench.tokens[name] = tokens / seconds
    used = flops(bench) / seconds / bench.rate
    bench.say(f"training, {name}", f"{tokens / seconds:.0f} tok/s, {used:.0%} of the product", remark)


def _our_step(bench: Bench, model: Any, tenants: int = 1) -> Callable[[], None]:
    from tinsmith.engine.commands import AdamParams, LoraSpec
    from tinsmith.engine.memory import Budget, available_memory
    from tinsmith.engine.runs import Run
    from tinsmith.engine.training import TrainingJob, peak_bytes, run_pass
    from tinsmith.wire.training import Datum, TrainingRequest

    runs = [Run.create(f"r{i}", model, LoraSpec(rank=RANK, seed=i)) for i in range(tenants)]
    total = available_memory(bench.device)
    room = Budget.split(total + model.nbytes, model.nbytes).passes
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, model.vocab_size, n + 1) for n in bench.lengths]
    data = [Datum(t[:-1].copy(), {"target_tokens": t[1:].copy()}) for t in texts]

    def step() -> None:
        jobs = []
        for i, run in enumerate(runs):
            own = data[i::tenants]
            request = TrainingRequest(run.name, 1, False, "cross_entropy", {}, own)
            jobs.append(TrainingJob(request, model, run.layout, run.weights))
        work: list[Any] = []
        for job, cut in [(each, cut) for each in jobs for cut in each.cuts]:
            rows = sum(c.rows for _, c in work) + cut.rows
            if work and peak_bytes(model, rows, cut.rows, True) > room:
                run_pass(work, room)
                work = []
            work.append((job, cut))
        run_pass(work, room)
        for run, job in zip(runs, jobs, strict=True):
            run.accumulate(job.gradients)
            run.optimize(AdamParams())

    return step


def train(bench: Bench) -> None:
    model = bench.model()
    _report_training(bench, "ours, one adapter", bench.time(_our_step(bench, model)))
    many = min(8, len(bench.lengths))
    _report_training(bench, f"ours, {many} adapters", bench.time(_our_step(bench, model, many)))


def peft(bench: Bench) -> None:
    """One sequence length, so that nothing is padded; the largest micro-batch that fits, with and without
    checkpointing; torch's fused attention and fused AdamW."""
    from peft import LoraConfig, get_peft_model

    best: tuple[float, str] | None = None
    n = max(bench.lengths)
    for checkpointing in (False, True):
        for micro in (1,) if bench.smoke else (4, 2, 1):
            try:
                base = bench.module("sdpa")
                model: Any = get_peft_model(
                    base, LoraConfig(r=RANK, lora_alpha=32, target_modules=list(TARGETS))
                )
                model.train()
                if checkpointing:
                    model.enable_input_require_grads()
                    model.gradient_checkpointing_enable({"use_reentrant": False})
                optimizer = torch.optim.AdamW(
                    [p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True
                )
                ids = torch.randint(0, base.config.vocab_size, (len(bench.lengths), n), device=bench.device)

                def step(
                    model: Any = model, ids: Any = ids, optimizer: Any = optimizer, micro: int = micro
                ) -> None:
                    for part in ids.split(micro):
                        model(input_ids=part, labels=part, use_cache=False).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()

                seconds = bench.time(step, 2)
            except torch.OutOfMemoryError:
                continue
            finally:
                model = optimizer = base = None  # type: ignore[assignment]
                bench.free()
            how = f"sdpa, {micro} x {n} at a time{', checkpointing' if checkpointing else ''}, fused AdamW"
            if best is None or seconds < best[0]:
                best = (seconds, how)
            break
    if best is None:
        raise RuntimeError("out of memory in every setting")
    seconds = best[0] * sum(bench.lengths) / (n * len(bench.lengths))
    _report_training(bench, "transformers + PEFT", seconds, best[1])


def _sample(bench: Bench, model: Any, count: int, output: int, adapters: int = 0) -> float:
    """Tokens a second behind the first ones of `count` sequences, on that many adapters in turns."""
    from tinsmith.engine.commands import LoraSpec, Reply, Sample, SampleParams
    from tinsmith.engine.runs import Run
    from tinsmith.engine.sampler import Sampler

    weights = [Run.create(f"r{i}", model, LoraSpec(rank=RANK, seed=i)).weights for i in range(adapters)]
    sampler = Sampler(model, (1 << 24) if bench.smoke else (12 << 30))
    rng = np.random.default_rng(0)
    best = 0.0
    for again in range(1 if bench.smoke else 3):  # the first time compiles and captures
        replies: list[Reply] = []
        for i in range(count):
            prompt = rng.integers(0, model.vocab_size, 8 if bench.smoke else 64).astype(np.int32)
            command = Sample(
                f"{again}:{i}", "m", None, prompt.tobytes(), SampleParams(seed=i, max_tokens=output, stop=())
            )
            sampler.add(command, weights[i % adapters] if adapters else None, replies.append)
        while any(not s.logprobs for s in sampler.running) or sampler.waiting:
            sampler.step()
        bench.wait()
        before, started = sum(len(s.logprobs) for s in sampler.running), time.perf_counter()
        while sampler.step():
            pass
        best = max(best, (count * output - before) / (time.perf_counter() - started))
        assert len(replies) == count
    if sampler.runner.decoder is not None and sampler.runner.decoder.trouble:
        bench.say("decode steps were not captured", sampler.runner.decoder.trouble)
    return best


def decode(bench: Bench) -> None:
    model = bench.model()
    for count in (1, 4) if bench.smoke else (1, 256):
        rate = bench.tokens[f"decode {count}"] = _sample(bench, model, count, 4 if bench.smoke else 128)
        bound = bench.bandwidth / model.nbytes * count
        bench.say(
            f"decode, batch {count}",
            f"{rate:.0f} tok/s",
            f"{rate / bound:.0%} of reading the weights once a step",
        )


def generate(bench: Bench) -> None:
    module = bench.module("sdpa")
    for count in (1, 4) if bench.smoke else (1, 256):
        output = 4 if bench.smoke else 64
        ids = torch.randint(
            0, module.config.vocab_size, (count, 8 if bench.smoke else 64), device=bench.device
        )

        def work(ids: Any = ids, output: int = output) -> None:
            module.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=output, do_sample=True, top_k=0,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip

        rate = count * output / bench.time(work, 1)
        ours = bench.tokens.get(f"decode {count}", float("nan"))
        bench.say(
            f"transformers' generate, batch {count}",
            f"{rate:.0f} tok/s",
            f"ours is {ours / rate:.1f} times that",
        )


def adapters(bench: Bench) -> None:
    model = bench.model()
    count = 4 if bench.smoke else 64
    output = 4 if bench.smoke else 128
    rates = {n: _sample(bench, model, count, output, n) for n in (0, 1, min(count, 32))}
    for n, rate in rates.items():
        bench.say(
            f"decode, batch {count}, {n} adapters", f"{rate:.0f} tok/s", f"{rates[0] / rate - 1:+.0%} time"
        )


def deterministic(bench: Bench) -> None:
    from tinsmith.engine.exactness_gpu import _company
    from tinsmith.engine.kernels import gpu, invariant

    with gpu.deterministic(), invariant.replaced(bench.device.type):
        model = bench.model()
        bench.say("--deterministic: what depends on company", ", ".join(_company(model)) or "nothing")
        _report_training(bench, "ours, --deterministic", bench.time(_our_step(bench, model), 1))
        count = 2 if bench.smoke else 256
        rate = _sample(bench, model, count, 4 if bench.smoke else 64)
        bench.say(f"decode, batch {count}, --deterministic", f"{rate:.0f} tok/s")


def vllm(bench: Bench) -> None:
    import importlib.util

    found = importlib.util.find_spec("vllm") is not None
    bench.say("vLLM", "installed: not compared yet" if found else "not installed here")


class OutOfTime(BaseException):
    """The time that was given is over; no `except Exception` on the way is to hear of it."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises OutOfTime inside when they are over; at once where there are none."""
    if seconds <= 0:
        raise OutOfTime

    def over(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again, where it came in what cannot raise
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


SECTIONS = (check, limits, train, peft, decode, generate, adapters, deterministic, vllm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [s.__name__ for s in SECTIONS]
    parser.add_argument("--only", default=",".join(names), help="sections, with commas between them")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model on the CPU, in Triton's interpreter"
    )
    parser.add_argument("--seconds", type=float, default=570, help="when to stop, at the latest")
    args = parser.parse_args()
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(names):
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}; known are {', '.join(names)}")
    from tinsmith.engine.kernels import gpu

    if not args.smoke and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --smoke tries the script without one")
    bench = Bench(torch.device("cpu" if args.smoke else "cuda:0"), args.smoke)
    started = time.time()
    with gpu.interpret() if args.smoke else contextlib.nullcontext():
        for section in SECTIONS:
            if section.__name__ not in wanted:
                continue
            print(f"== {section.__name__} ({time.time() - started:.0f} s)", flush=True)
            try:
                with within(started + args.seconds - time.time()):
                    section(bench)
            except OutOfTime:
                bench.say(section.__name__, "left out or not finished: no time")
            except Exception as error:
                traceback.print_exc()
                bench.say(section.__name__, f"failed: {type(error).__name__}: {str(error)[:120]}")
            bench.free()
    if not args.smoke:
        print(f"\n{torch.cuda.get_device_name(0)}, triton, {machine()}, {time.time() - started:.0f} s")
    print("\n" + table([("what", "measured", "beside"), *[row[:3] for row in bench.rows]]))


if __name__ == "__main__":
    main()
