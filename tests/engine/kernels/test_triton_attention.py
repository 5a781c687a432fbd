"""Attention in Triton against float64, and against itself in other company: on a GPU where there is one, else
in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.engine.kernels.test_attention import reference
from tests.engine.tiny import relative

pytest.importorskip("triton")
from tinsmith.engine.kernels import triton_attention as kernel
from tinsmith.engine.kernels.triton_attention import KEYS, Packed
from tinsmith.engine.kernels.triton_attention_backward import packed_backward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# heads, kv heads, key dim, value dim, window, sinks
SHAPES = [
    (4, 2, 64, 64, None, False),
    (8, 1, 16, 16, None, True),
    (2, 2, 24, 16, None, False),
    (2, 2, 192, 128, None, False),
    (6, 2, 80, 80, 8, True),
    (5, 1, 32, 40, 70, False),
]
SPANS = [(0, 1), (1, 40), (50, 70)]
ROWS = 128
NEAR = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


def inputs(
    shape: tuple, dtype: torch.dtype, rows: int = ROWS
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    heads, kv, dk, dv, _, sinks = shape
    g = torch.Generator().manual_seed(0)
    shapes = ((heads, dk), (kv, dk), (kv, dv))
    q, k, v = (torch.randn(rows, h, d, generator=g).to(DEVICE, dtype).transpose(0, 1) for h, d in shapes)
    return q, k, v, torch.randn(heads, generator=g).to(DEVICE) if sinks else None


def forward(
    q: Tensor, k: Tensor, v: Tensor, spans: list[tuple[int, int]], window: int | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Packed]:
    packed = Packed(spans, q.shape[0] // k.shape[0], DEVICE)
    out, lse = kernel.packed_forward(q, k, v, packed.tiles, 0.2, window, sinks, keep=True)
    assert lse is not None
    return out, lse, packed


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((s, torch.float32) for s in SHAPES), (SHAPES[0], torch.bfloat16), (SHAPES[4], torch.bfloat16)],
    ids=str,
)
def test_forward_and_gradients_are_those_of_float64(shape: tuple, dtype: torch.dtype) -> None:
    *_, window, _ = shape
    q, k, v, sinks = inputs(shape, dtype)
    out, lse, packed = forward(q, k, v, SPANS, window, sinks)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    grads = packed_backward(q, k, v, out, lse, weight, packed, 0.2, window)
    exact = [x.detach().double().cpu().requires_grad_(True) for x in (q, k, v)]
    total = torch.zeros(())
    for start, n in SPANS:
        rows = slice(start, start + n)
        expected = reference(
            *(x[:, rows] for x in exact), 0.2, window, None if sinks is None else sinks.cpu()
        )
        assert relative(out[rows].cpu(), expected.detach()) < NEAR[dtype]
        total = total + (expected * weight[rows].double().cpu()).sum()
    total.backward()
    for mine, theirs in zip(grads, exact, strict=True):
        assert theirs.grad is not None
        assert relative(mine.cpu(), theirs.grad) < 2 * NEAR[dtype]
    outside = torch.ones(ROWS, dtype=torch.bool)
    for start, n in SPANS:
        outside[start : start + n] = False
    assert not out[outside].any(), "rows of no sequence are zeros"
    assert not any(x[:, outside].any() for x in grads)


def paged(k: Tensor, v: Tensor, lengths: list[int], order: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences' keys and values one after another [heads, rows, dim] -> pages in `order`, and the table."""
    keys, values = (
        torch.full((len(order) + 1, KEYS, x.shape[0], x.shape[2]), 0.0, dtype=x.dtype, device=DEVICE)
        for x in (k, v)
    )
    table = torch.zeros(len(lengths), max(-(-n // KEYS) for n in lengths), dtype=torch.int32)
    slots, free = [], iter(order)
    for i, length in enumerate(lengths):
        for position in range(length):
            if position % KEYS == 0:
                table[i, position // KEYS] = next(free)
            slots.append(int(table[i, position // KEYS]) * KEYS + position % KEYS)
    kernel.write(k, v, keys, values, torch.tensor(slots, device=DEVICE))
    return keys, values, table.to(DEVICE)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(SHAPES[1], torch.bfloat16), (SHAPES[3], torch.float32), *((SHAPES[i], torch.bfloat16) for i in (4, 5))],
    ids=str,
)
def test_pages_give_the_bits_of_the_packed_pass(shape: tuple, dtype: torch.dtype) -> None:
    """Chunks of prompts and single tokens, in one launch, as the trainer computed them; `decode` within
    rounding."""
    *_, window, _ = shape
    lengths = [130, 65, 1]
    q, k, v, sinks = inputs(shape, dtype, sum(lengths))
    spans = [(0, 130), (130, 65), (195, 1)]
    whole, _, _ = forward(q, k, v, spans, window, sinks)
    keys, values, table = paged(k, v, lengths, [4, 2, 6, 1, 3, 5])
    # A chunk in the middle of the first sequence and its last token; the last token of the second; the third.
    rows = [(100, 129, 100, 0), (129, 130, 129, 0), (194, 195, 64, 1), (195, 196, 0, 2)]
    tiles = [
        (at, min(8, stop - at), first + at - start, i)
        for start, stop, first, i in rows
        for at in range(start, stop, 8)
    ]
    out = torch.zeros_like(whole)
    of = torch.tensor(tiles, dtype=torch.int32, device=DEVICE)
    kernel.paged_forward(q, keys, values, of, table, out, 0.2, window, sinks)
    seen = [*range(100, 130), 194, 195]
    assert torch.equal(out[seen], whole[seen])
    singles = torch.tensor(
        [(129, 1, 129, 0), (0, 0, 0, 0), (194, 1, 64, 1), (195, 1, 0, 2)], dtype=torch.int32
    )
    for splits in (1, 3):
        out = torch.zeros_like(whole)
        kernel.decode(q, keys, values, singles.to(DEVICE), table, out, 0.2, window, sinks, splits)
        assert relative(out[[129, 194, 195]].cpu(), whole[[129, 194, 195]].cpu()) < NEAR[dtype]
        assert not out[0].any(), "a tile without rows is none"


def test_company_changes_no_bit_of_a_sequence() -> None:
    shape, dtype = (4, 2, 32, 32, 20, True), torch.bfloat16
    q, k, v, sinks = inputs(shape, dtype)
    weight = torch.randn(ROWS, 4, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)

    def run(spans: list[tuple[int, int]]) -> list[Tensor]:
        out, lse, packed = forward(q, k, v, spans, 20, sinks)
        grads = packed_backward(q, k, v, out, lse, weight, packed, 0.2, 20)
        return [out[50:120], *(x[:, 50:120] for x in grads)]

    for a, b in zip(run([(50, 70)]), run(SPANS), strict=True):
        assert torch.equal(a, b)
