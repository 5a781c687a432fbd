"""The CPU attention kernel against float64, and against itself in other company."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.engine.tiny import relative, threads
from tinsmith.engine.kernels import attention as kernel
from tinsmith.engine.model.attention import PAGE, round_up

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(kernel.library() is None, reason="no C++ compiler here")

# heads, kv heads, key dim, value dim, window, sinks
SHAPES = [
    (4, 2, 64, 64, None, False),
    (8, 1, 16, 16, None, True),
    (2, 2, 24, 16, None, False),
    (3, 3, 192, 128, None, False),
    (4, 2, 80, 80, 8, False),
    (6, 2, 32, 40, 70, True),
    (130, 1, 16, 16, None, False),
]
SPANS = [(0, 1), (1, 64), (70, 65), (135, 200), (340, 17)]
ROWS = 360


def inputs(
    shape: tuple, dtype: torch.dtype, rows: int = ROWS
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    heads, kv, dk, dv, _, sinks = shape
    g = torch.Generator().manual_seed(0)
    shapes = ((heads, dk), (kv, dk), (kv, dv))
    q, k, v = (torch.randn(rows, h, d, generator=g).to(dtype).transpose(0, 1) for h, d in shapes)
    return q, k, v, torch.randn(heads, generator=g) if sinks else None


def reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: Tensor | None
) -> Tensor:
    """One sequence in float64: [rows, Hq, Dv]."""
    n, group = q.shape[1], q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * scale
    at = torch.arange(n)
    hidden = at[None] > at[:, None]
    if window is not None:
        hidden |= at[None] <= at[:, None] - window
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(-1, n, 1)], -1)
    return (scores.softmax(-1)[..., :n] @ v).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestSpans:
    def test_forward_and_gradients_are_those_of_float64(self, shape: tuple, dtype: torch.dtype) -> None:
        *_, window, _ = shape
        q, k, v, sinks = inputs(shape, dtype)
        near = 1e-6 if dtype is torch.float32 else 4e-3
        leaves = [x.detach().requires_grad_(True) for x in (q, k, v)]
        out = kernel.SpanAttention.apply(*leaves, kernel.Spans(SPANS), 0.2, window, sinks)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        out.backward(weight)
        exact = [x.detach().double().requires_grad_(True) for x in (q, k, v)]
        total = torch.zeros(())
        for start, n in SPANS:
            rows = slice(start, start + n)
            expected = reference(*(x[:, rows] for x in exact), 0.2, window, sinks)
            assert relative(out[rows].detach(), expected.detach()) < near
            total = total + (expected * weight[rows].double()).sum()
        total.backward()
        for mine, theirs in zip(leaves, exact, strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            assert relative(mine.grad, theirs.grad) < 4 * near

    @pytest.mark.parametrize("before", [0.0, float("nan")], ids=["fresh pages", "pages of a broken sequence"])
    def test_pages_chunks_and_threads_change_no_bit(
        self, shape: tuple, dtype: torch.dtype, before: float
    ) -> None:
        _, kv, dk, dv, window, _ = shape
        n = 200
        q, k, v, sinks = inputs(shape, dtype, n)
        with threads(1):
            whole = kernel.SpanAttention.apply(q, k, v, kernel.Spans([(0, n)]), 0.2, window, sinks)
        with threads(2):
            again = kernel.SpanAttention.apply(q, k, v, kernel.Spans([(0, n)]), 0.2, window, sinks)
        assert torch.equal(whole, again)
        keys = torch.full((12, kv, dk, PAGE), before, dtype=dtype)
        values = torch.full((12, kv, PAGE, round_up(dv, kernel.VALUE_PAD)), before, dtype=dtype)
        mine, other = [7, 2, 11, 4], [1, 3, 5, 6]
        start = 0
        for count in (63, 1, 1, 30, 1, n - 96):
            rows = slice(start, start + count)
            # Two sequences of the same content beside each other, one from behind.
            both = [torch.cat([x[:, rows], x[:, rows]], 1) for x in (q, k, v)]
            chunks = kernel.Chunks([(count, count, start, other), (0, count, start, mine)])
            out = kernel.paged_attention(*both, keys, values, chunks, 0.2, window, sinks)
            assert torch.equal(out[:count], whole[rows])
            assert torch.equal(out[count:], whole[rows])
            start += count


def test_without_a_compiler_the_torch_path_passes_the_same_tests() -> None:
    """The exactness tests once more, in a process that is told to do without."""
    environment = {**os.environ, "TINSMITH_KERNELS": "off", "OMP_NUM_THREADS": "1"}
    chosen = [
        "tests/engine/test_exactness.py",
        "tests/engine/test_sampler.py::TestExact",
        "tests/engine/test_training.py::TestExactness",
        "tests/engine/test_families.py",
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *chosen,
            "-m",
            "not slow",
            "-k",
            "not TestFamily or Llama or Qwen3Moe or GptOss or DeepseekV3 or KimiLinear",
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
