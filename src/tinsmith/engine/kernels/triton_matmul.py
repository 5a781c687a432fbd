"""Matrix products in Triton with one tile and one order of the sum, whatever the number of rows.

What --deterministic takes for every linear layer: a row of the result depends on that row and the weights
alone, bit for bit (cuBLAS picks other tiles, and splits of the sum, for other numbers of rows). `grouped` is
the same over experts, each with its own weights.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinsmith.engine.kernels.triton_common import INTERPRETED, dot, exact_dot

_M, _N, _K = (16, 32, 64) if INTERPRETED else (128, 128, 64)


@triton.jit
def _matmul(
    A, B, C, BIAS, rows, cols, inner, stride_ab, stride_am, stride_ak, stride_bb, stride_bk, stride_bn,
    stride_cb, stride_cm, batch,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """C = A B (+ BIAS) in tiles [M, N]; a program takes every num_programs-th of them."""
    down, across = tl.cdiv(rows, M), tl.cdiv(cols, N)
    tiles = down * across
    offs_k = tl.arange(0, K)
    for at in range(tl.program_id(0), tiles * batch, tl.num_programs(0)):
        index, tile = (at // tiles).to(tl.int64), at % tiles
        # Tiles that lie beside each other share rows of A and columns of B in the cache.
        wide = GROUP * across
        first = tile // wide * GROUP
        height = tl.minimum(down - first, GROUP)
        m = first + tile % wide % height
        n = tile % wide // height
        offs_m, offs_n = m * M + tl.arange(0, M), n * N + tl.arange(0, N)
        a_at = A + index * stride_ab + offs_m.to(tl.int64)[:, None] * stride_am + offs_k[None, :] * stride_ak
        b_at = B + index * stride_bb + offs_k[:, None] * stride_bk + offs_n.to(tl.int64)[None, :] * stride_bn
        in_rows, in_cols = offs_m < rows, offs_n < cols
        acc = tl.zeros([M, N], tl.float32)
        for k in range(0, inner, K):
            if EVEN:
                a = tl.load(a_at, mask=in_rows[:, None], other=0.0)
                b = tl.load(b_at, mask=in_cols[None, :], other=0.0)
            else:
                inside = k + offs_k < inner
                a = tl.load(a_at, mask=in_rows[:, None] & inside[None, :], other=0.0)
                b = tl.load(b_at, mask=in_cols[None, :] & inside[:, None], other=0.0)
            acc = dot(a, b, acc, EXACT)
            a_at += K * stride_ak
            b_at += K * stride_bk
        if HAS_BIAS:
            acc += tl.load(BIAS + offs_n, mask=in_cols, other=0.0).to(tl.float32)[None, :]
        to = C + index * stride_cb + offs_m.to(tl.int64)[:, None] * stride_cm + offs_n[None, :]
        tl.store(to, acc.to(C.dtype.element_ty), mask=in_rows[:, None] & in_cols[None, :])


@triton.jit
def _grouped(
    X, W, BIAS, Y, TILES, inner, outer, stride_x, stride_we, stride_wk, stride_wn, stride_y, stride_bias,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's rows. TILES: int32 [tiles, 3], (first row, rows, expert); none has 0 rows."""
    tile = TILES + tl.program_id(0) * 3
    row, count, expert = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2).to(tl.int64)
    if count == 0:
        return
    offs_m, offs_n = tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
    offs_k = tl.arange(0, K)
    real, in_cols = offs_m < count, offs_n < outer
    x_at = X + (row + offs_m)[:, None] * stride_x + offs_k[None, :]
    w_at = W + expert * stride_we + offs_k[:, None] * stride_wk + offs_n.to(tl.int64)[None, :] * stride_wn
    acc = tl.zeros([M, N], tl.float32)
    for k in range(0, inner, K):
        inside = k + offs_k < inner
        x = tl.load(x_at, mask=real[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_at, mask=in_cols[None, :] & inside[:, None], other=0.0)
        acc = dot(x, w, acc, EXACT)
        x_at += K
        w_at += K * stride_wk
    if HAS_BIAS:
        acc += tl.load(BIAS + expert * stride_bias + offs_n, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    to = Y + (row + offs_m)[:, None] * stride_y + offs_n[None, :]
    tl.store(to, acc.to(Y.dtype.element_ty), mask=real[:, None] & in_cols[None, :])


@functools.cache
def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def matmul(
    a: Tensor, b: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """a b (+ bias): [m, k] and [k, n], or [batch, m, k] and [batch, k, n]; any strides, one float dtype."""
    if a.dim() == 2:
        return matmul(a.unsqueeze(0), b.unsqueeze(0), bias, out_dtype=out_dtype)[0]
    batch, rows, inner = a.shape
    cols = b.shape[-1]
    c = a.new_empty(batch, rows, cols, dtype=out_dtype or a.dtype)
    if c.numel() == 0:
        return c
    if inner == 0:
        return c.zero_() if bias is None else c.copy_(bias.expand_as(c))
    tiles = batch * -(-rows // _M) * -(-cols // _N)
    _matmul[(min(tiles, _programs(a.device)),)](
        a, b, c, bias, rows, cols, inner, *a.stride(), *b.stride(), c.stride(0), c.stride(1), batch,
        _M, _N, _K, 8, inner % _K == 0, bias is not None, exact_dot(a.dtype), num_warps=8,
        num_stages=3 if a.dtype is torch.float32 else 4,
    )  # fmt: skip
    return c


def grouped(x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tensor, rows: int) -> Tensor:
    """Each tile's rows of x [rows, in] times its expert's weight: [experts, in, out] in any strides, bias
    [experts, out] -> [rows, out]. tiles: int32 [tiles, 3], (first row, rows, expert), `rows` rows at most,
    a power of two from 16 on; rows outside of tiles are undefined."""
    y = x.new_empty(len(x), weight.shape[2])
    _grouped[(len(tiles), -(-weight.shape[2] // _N))](
        x, weight, bias, y, tiles, x.shape[1], weight.shape[2], x.stride(0), *weight.stride(), y.stride(0),
        0 if bias is None else bias.stride(0), rows, _N, _K, bias is not None, exact_dot(x.dtype),
        num_warps=8 if rows >= 128 else 4, num_stages=3,
    )  # fmt: skip
    return y
