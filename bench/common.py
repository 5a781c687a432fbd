"""What the benchmarks share: a model of the benchmark's shape, the machine's own limits, a table."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))


def make_model(
    folder: Path, *, hidden: int = 512, layers: int = 8, inner: int = 1536, vocab: int = 8192
) -> Path:
    """A random Qwen3-shaped model, 33.6 M parameters by default, in bf16, with a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        intermediate_size=inner,
        vocab_size=vocab,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(folder)
    return folder


def gemm_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a square matrix product on all threads: the machine's compute limit, as measured."""
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    seconds = median_time(lambda: torch.mm(a, b), 5)
    return 2 * size**3 / seconds


def copy_rate(megabytes: int = 256) -> float:
    """Bytes per second of a copy, those read and those written together: the memory's limit, as measured."""
    a = torch.ones(megabytes << 18)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / median_time(lambda: b.copy_(a), 7)


def read_rate(megabytes: int = 256) -> float:
    """Bytes per second that are read by all threads: the limit of a step that reads weights, as measured."""
    a = torch.ones(megabytes << 17, dtype=torch.int64)  # a sum of integers waits for nothing but memory
    return a.nbytes / median_time(a.sum, 15)


def with_surroundings() -> None:
    """Start this script again with the settings that the server gives its engine's process."""
    from tinsmith.engine.process import surroundings

    if "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **surroundings(os.environ)})


def median_time(work: Callable[[], object], runs: int = 5, warm: int = 1) -> float:
    """Median seconds of `work`."""
    for _ in range(warm):
        work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def peak_memory() -> int:
    """The most memory that this process has had resident, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine() -> str:
    """One line that says where and with what the figures were made."""
    import transformers

    name = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return (
        f"{name}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{time.strftime('%Y-%m-%d')}"
    )


def table(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


@dataclass(frozen=True)
class Target:
    """A figure that is to be reached: at least `wanted`, or at most."""

    # 1 training, 2 many runs, 3 sampling, 4 new weights, 5 memory, 6 scaling, 7 through the SDK, 8 company
    number: int
    name: str
    wanted: float
    measured: float
    most: bool = False

    @property
    def met(self) -> bool:
        return self.measured <= self.wanted if self.most else self.measured >= self.wanted

    @staticmethod
    def table(targets: list[Target]) -> str:
        rows = [("no.", "target", "wanted", "measured", "met")]
        for t in targets:
            sign = "at most" if t.most else "at least"
            met = "yes" if t.met else "NO"
            rows.append((str(t.number), t.name, f"{sign} {t.wanted:g}", f"{t.measured:.3g}", met))
        return table(rows)


def write(path: Path | None, targets: list[Target]) -> None:
    """Leave the targets for bench/targets.py, which prints those of all scripts together."""
    if path is not None:
        path.write_text(json.dumps([asdict(t) for t in targets]))
