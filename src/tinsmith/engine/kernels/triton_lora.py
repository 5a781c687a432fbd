"""The products of adapters in Triton: all adapters of a pass in one launch each.

Rows are cut into tiles of one adapter; a tile finds its factor by its address, so that nothing is stacked or
copied, adapters may have different ranks, and one captured decode step serves whatever adapters come. An
address of 0 is no adapter.

    z  = x A^T          `shrink`, and dz = dy B of the backward pass
    y += z B^T          `expand`, and dx += dz A
    dA += dz^T x, dB += scale dy^T z: `outer`, block after block in their order, without atomics

B has alpha / rank in it (see AdapterWeights). Every sum has one order that the tile alone decides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinsmith.engine.kernels.triton_common import dot, exact_dot, power


@triton.jit
def _shrink(
    X, Z, TILES, FACTORS, RANKS, stride_x, stride_z, stride_part, inner, width, each,
    RANK_FIRST: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Z[part, rows, :width] = x W over the part's own columns of x. TILES: int32 [tiles, 3], (first row,
    rows, adapter). The factor lies as [rank, inner] (RANK_FIRST) or as [inner, rank]."""
    tile = TILES + tl.program_id(0) * 3
    row, count, owner = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    if count == 0:
        return
    offs_m, offs_k = tl.arange(0, BLOCK), tl.arange(0, K)
    offs_r = tl.program_id(1) * R + tl.arange(0, R)
    real = offs_m < count
    address, rank = tl.load(FACTORS + owner), tl.load(RANKS + owner)
    acc = tl.zeros([BLOCK, R], tl.float32)
    if address != 0:
        factor = address.to(tl.pointer_type(X.dtype.element_ty))
        ranks = offs_r < rank
        start = tl.program_id(2) * each
        x_at = X + (row + offs_m)[:, None] * stride_x
        for k in range(start, tl.minimum(inner, start + each), K):
            inside = k + offs_k < inner
            if EVEN:
                x = tl.load(x_at + (k + offs_k)[None, :], mask=real[:, None], other=0.0)
            else:
                x = tl.load(x_at + (k + offs_k)[None, :], mask=real[:, None] & inside[None, :], other=0.0)
            if RANK_FIRST:
                w_at = factor + offs_r[None, :].to(tl.int64) * inner + (k + offs_k)[:, None]
            else:
                w_at = factor + (k + offs_k)[:, None].to(tl.int64) * rank + offs_r[None, :]
            w = tl.load(w_at, mask=ranks[None, :] & inside[:, None], other=0.0)
            acc = dot(x, w, acc, EXACT)
    to = (
        Z + tl.program_id(2).to(tl.int64) * stride_part + (row + offs_m)[:, None] * stride_z + offs_r[None, :]
    )
    tl.store(to, acc.to(Z.dtype.element_ty), mask=real[:, None] & (offs_r < width)[None, :])


@triton.jit
def _expand(
    Z, Y, TILES, FACTORS, RANKS, stride_part, stride_z, stride_y, stride_yn, outer, parts,
    RANK_FIRST: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Y[rows, :outer] += z W, z the sum of its parts in order, rounded as Y is. The factor lies as
    [rank, outer] (RANK_FIRST) or as [outer, rank]."""
    tile = TILES + tl.program_id(0) * 3
    row, count, owner = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    address = tl.load(FACTORS + owner)
    if (count == 0) | (address == 0):
        return
    factor = address.to(tl.pointer_type(Y.dtype.element_ty))
    rank = tl.load(RANKS + owner)
    offs_m, offs_n = tl.arange(0, BLOCK), tl.program_id(1) * N + tl.arange(0, N)
    real = offs_m < count
    acc = tl.zeros([BLOCK, N], tl.float32)
    for r in range(0, rank, R):
        offs_r = r + tl.arange(0, R)
        z_at = Z + (row + offs_m)[:, None] * stride_z + offs_r[None, :]
        inside = real[:, None] & (offs_r < rank)[None, :]
        z = tl.load(z_at, mask=inside, other=0.0).to(tl.float32)
        for part in range(1, parts):
            z += tl.load(z_at + part * stride_part, mask=inside, other=0.0)
        if RANK_FIRST:
            w_at = factor + offs_r[:, None].to(tl.int64) * outer + offs_n[None, :]
        else:
            w_at = factor + offs_n[None, :].to(tl.int64) * rank + offs_r[:, None]
        w = tl.load(w_at, mask=(offs_r < rank)[:, None] & (offs_n < outer)[None, :], other=0.0)
        acc = dot(z.to(Y.dtype.element_ty), w, acc, EXACT)
    y_at = Y + (row + offs_m)[:, None] * stride_y + offs_n[None, :] * stride_yn
    inside = real[:, None] & (offs_n < outer)[None, :]
    y = tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_at, (y + acc).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _outer(
    U, V, JOBS, BLOCKS, TARGETS, RANKS, SCALES, stride_u, stride_v, wide,
    RANK_FIRST: tl.constexpr, R: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One adapter's target += scale u^T v over its blocks of rows, one sum a block.

    U: [rows, rank], V: [rows, wide]; the fp32 target lies as [rank, wide] (RANK_FIRST) or as [wide, rank].
    JOBS: int32 [jobs, 4], (first block, blocks, step from one to the next, adapter); BLOCKS: int32 [blocks,
    2], (first row, end). TARGETS: int64 addresses by job.
    """
    job = JOBS + tl.program_id(0) * 4
    block, blocks, step, owner = tl.load(job), tl.load(job + 1), tl.load(job + 2), tl.load(job + 3)
    address = tl.load(TARGETS + tl.program_id(0))
    if (blocks == 0) | (address == 0):
        return
    rank, scale = tl.load(RANKS + owner), tl.load(SCALES + owner)
    target = address.to(tl.pointer_type(tl.float32))
    offs_n, offs_r = tl.program_id(1) * N + tl.arange(0, N), tl.program_id(2) * R + tl.arange(0, R)
    offs_k = tl.arange(0, K)
    inside = (offs_r < rank)[:, None] & (offs_n < wide)[None, :]
    if RANK_FIRST:
        at = target + offs_r[:, None].to(tl.int64) * wide + offs_n[None, :]
    else:
        at = target + offs_n[None, :].to(tl.int64) * rank + offs_r[:, None]
    total = tl.load(at, mask=inside, other=0.0)
    for i in range(0, blocks):
        rows = BLOCKS + (block + i * step) * 2
        start, stop = tl.load(rows), tl.load(rows + 1)
        acc = tl.zeros([R, N], tl.float32)
        for k in range(start, stop, K):
            row = (k + offs_k).to(tl.int64)
            real = row < stop
            u = tl.load(
                U + row[None, :] * stride_u + offs_r[:, None],
                mask=real[None, :] & (offs_r < rank)[:, None],
                other=0.0,
            )
            v = tl.load(
                V + row[:, None] * stride_v + offs_n[None, :],
                mask=real[:, None] & (offs_n < wide)[None, :],
                other=0.0,
            )
            acc = dot(u, v, acc, EXACT)
        total += acc * scale
    tl.store(at, total, mask=inside)


def shrink(
    x: Tensor, tiles: Tensor, factors: Tensor, ranks: Tensor, width: int, *, rank_first: bool, rows: int,
    parts: int = 1,
) -> Tensor:  # fmt: skip
    """x [rows, inner] times each tile's factor: [rows, width] in x's dtype; rows outside of tiles are
    undefined.

    tiles: int32 [tiles, 3], (first row, rows, adapter), `rows` rows at most; factors: int64 addresses by
    adapter, of [rank, inner] (rank_first) or [inner, rank], dense, in x's dtype; ranks: int32, at most
    `width`, multiples of 16. With several parts, fp32 [parts, rows, width], which `expand` adds up.
    """
    inner, r, k = x.shape[1], min(power(width), 128), 64
    each = -(-inner // (parts * k)) * k
    parts = -(-inner // each)
    z = (
        x.new_empty(len(x), width) if parts == 1
        else x.new_empty(parts, len(x), width, dtype=torch.float32)
    )  # fmt: skip
    _shrink[(len(tiles), -(-width // r), parts)](
        x, z, tiles, factors, ranks, x.stride(0), width, 0 if parts == 1 else z.stride(0), inner, width, each,
        rank_first, rows, r, k, inner % k == 0, exact_dot(x.dtype), num_warps=4, num_stages=3,
    )  # fmt: skip
    return z


def expand(
    z: Tensor, y: Tensor, tiles: Tensor, factors: Tensor, ranks: Tensor, *, rank_first: bool, rows: int
) -> None:
    """y [rows, outer] += z times each tile's factor, [rank, outer] (rank_first) or [outer, rank]; z as
    `shrink` gives it."""
    outer, n, width = y.shape[1], 128, z.shape[-1]
    parts = 1 if z.dim() == 2 else len(z)
    _expand[(len(tiles), -(-outer // n))](
        z, y, tiles, factors, ranks, 0 if parts == 1 else z.stride(0), z.stride(-2), y.stride(0), y.stride(1),
        outer, parts, rank_first, rows, min(power(width), 64), n, exact_dot(y.dtype),
        num_warps=4, num_stages=2,
    )  # fmt: skip


def outer(
    u: Tensor, v: Tensor, jobs: Tensor, blocks: Tensor, targets: Tensor, ranks: Tensor, scales: Tensor, *,
    width: int, rank_first: bool,
) -> None:  # fmt: skip
    """Add scale u^T v over each job's blocks of rows to its target: fp32 [rank, wide] (rank_first) or
    [wide, rank], dense.

    u: [rows, at least width], v: [rows, wide]; jobs: int32 [jobs, 4], (first block, blocks, step, adapter);
    blocks: int32 [blocks, 2], (first row, end); targets: int64 addresses by job, 0 for none; ranks: int32,
    the true ones, at most `width`; scales: fp32 by adapter.
    """
    wide, r, n = v.shape[1], min(power(width), 64), 64
    _outer[(len(jobs), -(-wide // n), -(-width // r))](
        u, v, jobs, blocks, targets, ranks, scales, u.stride(0), v.stride(0), wide,
        rank_first, r, n, 64, exact_dot(u.dtype), num_warps=4, num_stages=3,
    )  # fmt: skip
