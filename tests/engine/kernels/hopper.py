"""Compile every Triton kernel for an H100 on a machine without one, at the sizes of real models, and print
one line each: name, bytes of shared memory, bytes spilled per thread, and which matrix instructions it uses.

    python tests/engine/kernels/hopper.py

Nothing is launched: every launch stops behind the compiler. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

BF16 = torch.bfloat16


class NoDevice:
    """A driver that knows what it would be driving."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_instead_of_launching() -> None:
    real = JITFunction.run
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = real(self, *args, grid=grid, warmup=True, **options)
        spilled = "?"
        if (tools / "cuobjdump").exists():
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(kernel.asm["cubin"])
                file.flush()
                command = [str(tools / "cuobjdump"), "-res-usage", file.name]
                usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            spilled = max(re.findall(r"STACK:(\d+)", usage), key=int, default="?")
        ptx = kernel.asm["ptx"]
        matrix = "wgmma" if "wgmma" in ptx else "mma" if "mma.sync" in ptx else "-"
        print("KERNEL", self.__name__, kernel.metadata.shared, spilled, matrix, flush=True)
        return kernel

    JITFunction.run = run  # type: ignore[method-assign]
    driver.set_active(NoDevice())


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(BF16)


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def attention() -> None:
    from tinsmith.engine.kernels import triton_attention as kernel
    from tinsmith.engine.kernels.triton_attention_backward import packed_backward

    # Qwen3-8B, GPT-OSS, DeepSeek-V3
    for heads, kv, dim, value, window, sinks in (
        (32, 8, 128, 128, None, False),
        (64, 8, 64, 64, 128, True),
        (16, 16, 192, 128, None, False),
    ):
        q, k, v = (bf16(256, h, d).transpose(0, 1) for h, d in ((heads, dim), (kv, dim), (kv, value)))
        extra = torch.randn(heads) if sinks else None
        spans = kernel.Packed([(0, 256)], heads // kv, q.device)
        out, lse = kernel.packed_forward(q, k, v, spans.tiles, 0.1, window, extra, keep=True)
        assert lse is not None
        packed_backward(q, k, v, out, lse, out, spans, 0.1, window)
        keys, values, pages = bf16(9, 64, kv, dim), bf16(9, 64, kv, value), ints(4, 8)
        kernel.paged_forward(q, keys, values, spans.tiles, pages, out, 0.1, window, extra)
        kernel.decode(q, keys, values, spans.tiles, pages, out, 0.1, window, extra, 8)
        kernel.write(k, v, keys, values, torch.zeros(256, dtype=torch.int64))


def adapters() -> None:
    from tinsmith.engine.kernels import triton_lora as kernel

    x, y = bf16(256, 4096), bf16(256, 1024)
    tiles, to, ranks = ints(4, 3), torch.zeros(3, dtype=torch.int64), ints(3)
    for rows, parts in ((64, 1), (16, 8)):
        for a, b, first in ((x, y, True), (y, x, False)):
            z = kernel.shrink(a, tiles, to, ranks, 32, rank_first=first, rows=rows, parts=parts)
            kernel.expand(z, b, tiles, to, ranks, rank_first=not first, rows=rows)
    for wide, first in ((x, True), (y, False)):
        kernel.outer(
            bf16(256, 32), wide, ints(2, 4), ints(3, 2), to, ranks, torch.ones(3), width=32, rank_first=first
        )


def products() -> None:
    from tinsmith.engine.kernels import triton_matmul as kernel

    x, w = bf16(256, 4096), bf16(1024, 4096)
    kernel.matmul(x, w.T)
    kernel.matmul(bf16(256, 1024), w)
    kernel.matmul(bf16(2, 64, 64), bf16(2, 64, 64))
    kernel.grouped(x, bf16(4, 256, 4096).transpose(1, 2), None, ints(4, 3), 64)
    kernel.grouped(bf16(256, 256), bf16(4, 256, 4096), bf16(4, 4096), ints(4, 3), 128)


def rows() -> None:
    from tinsmith.engine.kernels import triton_elementwise as kernel
    from tinsmith.engine.kernels import triton_sampling

    x, logits = bf16(256, 4096), bf16(16, 151936)
    for wide in (x, x.view(-1, 128)):
        inverse = torch.empty(len(wide))
        kernel.norm(wide, wide[0], 1e-5, 0, inverse)
        kernel.norm_backward(wide, wide[0], wide, inverse, 0)
    kernel.gate(x, x)
    kernel.gate_backward(x, x, x)
    q = bf16(32, 256, 128)
    kernel.rotate(q, q[0], q[0], 128, back=False)
    kernel.rotate(q, q[0], q[0], 128, back=True)
    table = kernel.LogSoftmax(logits)
    table.table()
    table.gradient(torch.zeros(16, 1, dtype=torch.int64), torch.zeros(16, 1))
    kernel.LogSoftmax(logits, torch.ones(16))
    triton_sampling.choose(
        logits,
        torch.zeros(8, dtype=torch.int64),
        torch.ones(8),
        ints(8),
        torch.ones(8),
        torch.zeros(8).double(),
    )


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise SystemExit("TRITON_INTERPRET is set: nothing would be compiled")
    compile_instead_of_launching()
    for part in (attention, adapters, products, rows):
        part()
