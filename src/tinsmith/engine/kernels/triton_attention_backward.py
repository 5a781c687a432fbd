"""The gradient of packed causal attention in Triton: two kernels, each of which sums in one fixed order.

dQ goes over the keys of a tile of queries, dK and dV over the queries of a tile of keys, so nothing is added
by atomics and a sequence's gradients are its own affair (formulas: Dao et al. 2022, algorithm 4). With sinks
the log-sum-exp has them in it, and nothing else changes: they are frozen.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tinsmith.engine.kernels.triton_attention import KEYS, ROWS, Packed, Shape
from tinsmith.engine.kernels.triton_common import INTERPRETED, dot, exact_dot

_LOG2E = 1.4426950408889634


@triton.jit
def _delta(
    OUT, GRAD, DELTA, stride_or, stride_oh, stride_gr, stride_gh, heads, rows, dim_v, R: tl.constexpr,
    DV: tl.constexpr,
):  # fmt: skip
    """fp32 [heads, rows]: the sum of out * grad over a head."""
    pair = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    row, head = pair // heads, pair % heads
    offs = tl.arange(0, DV)[None, :]
    real = (pair < rows * heads)[:, None] & (offs < dim_v)
    out_at = OUT + (row * stride_or + head * stride_oh)[:, None] + offs
    grad_at = GRAD + (row * stride_gr + head * stride_gh)[:, None] + offs
    out = tl.load(out_at, mask=real, other=0.0).to(tl.float32)
    grad = tl.load(grad_at, mask=real, other=0.0).to(tl.float32)
    tl.store(DELTA + head * rows + row, tl.sum(out * grad, 1), mask=pair < rows * heads)


@triton.jit
def _grad_q(
    Q, K, V, GRAD, LSE, DELTA, DQ, TILES,
    stride_qr, stride_qh, stride_kr, stride_kh, stride_vr, stride_vh, stride_gr, stride_gh, stride_dr,
    stride_dh, rows, scale, scale2, group, window, dim, dim_v,
    PACK: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One tile of query rows (see triton_attention._forward) over its keys."""
    tile = TILES + tl.program_id(0) * 4
    row, count = tl.load(tile).to(tl.int64), tl.load(tile + 1)
    first, sequence = tl.load(tile + 2), tl.load(tile + 3).to(tl.int64)
    parts = tl.cdiv(group, PACK)
    kv = tl.program_id(1) // parts
    offs_m, offs_n = tl.arange(0, BLOCK), tl.arange(0, KEYS)
    offs_1, offs_v = tl.arange(0, D1), tl.arange(0, DV)
    head = (tl.program_id(1) % parts) * PACK + offs_m % PACK
    place = offs_m // PACK
    real = (place < count) & (head < group)
    head = kv * group + head
    at = first + place
    q_at = Q + (row + place)[:, None] * stride_qr + head[:, None] * stride_qh
    q1 = tl.load(q_at + offs_1[None, :], mask=real[:, None] & (offs_1 < dim)[None, :], other=0.0)
    dq1 = tl.zeros([BLOCK, D1], tl.float32)
    if D2 > 0:
        offs_2 = D1 + tl.arange(0, D2)
        q2 = tl.load(q_at + offs_2[None, :], mask=real[:, None] & (offs_2 < dim)[None, :], other=0.0)
        dq2 = tl.zeros([BLOCK, D2], tl.float32)
    g_at = GRAD + (row + place)[:, None] * stride_gr + head[:, None] * stride_gh + offs_v[None, :]
    grad = tl.load(g_at, mask=real[:, None] & (offs_v < dim_v)[None, :], other=0.0)
    lse = tl.load(LSE + head.to(tl.int64) * rows + row + place, mask=real, other=0.0)
    delta = tl.load(DELTA + head.to(tl.int64) * rows + row + place, mask=real, other=0.0)
    stop = first + count
    start = 0
    if WINDOW:
        start = tl.maximum(0, first - window + 1) // KEYS * KEYS
    for n in range(start, stop, KEYS):
        inside = n + offs_n < stop
        k_at = K + (sequence + n + offs_n)[:, None] * stride_kr + kv * stride_kh
        k1 = tl.load(k_at + offs_1[None, :], mask=inside[:, None] & (offs_1 < dim)[None, :], other=0.0)
        s = dot(q1, tl.trans(k1), tl.zeros([BLOCK, KEYS], tl.float32), EXACT)
        if D2 > 0:
            k2 = tl.load(k_at + offs_2[None, :], mask=inside[:, None] & (offs_2 < dim)[None, :], other=0.0)
            s = dot(q2, tl.trans(k2), s, EXACT)
        seen = ((n + offs_n)[None, :] <= at[:, None]) & real[:, None]
        if WINDOW:
            seen &= (n + offs_n)[None, :] > at[:, None] - window
        p = tl.where(seen, tl.exp2(s * scale2 - lse[:, None]), 0.0)
        v_at = V + (sequence + n + offs_n)[None, :] * stride_vr + kv * stride_vh + offs_v[:, None]
        v = tl.load(v_at, mask=inside[None, :] & (offs_v < dim_v)[:, None], other=0.0)
        dp = dot(grad, v, tl.zeros([BLOCK, KEYS], tl.float32), EXACT)
        ds = (p * (dp - delta[:, None])).to(q1.dtype)
        dq1 = dot(ds, k1, dq1, EXACT)
        if D2 > 0:
            dq2 = dot(ds, k2, dq2, EXACT)
    to = DQ + (row + place)[:, None] * stride_dr + head[:, None] * stride_dh
    tl.store(
        to + offs_1[None, :],
        (dq1 * scale).to(DQ.dtype.element_ty),
        mask=real[:, None] & (offs_1 < dim)[None, :],
    )
    if D2 > 0:
        tl.store(
            to + offs_2[None, :],
            (dq2 * scale).to(DQ.dtype.element_ty),
            mask=real[:, None] & (offs_2 < dim)[None, :],
        )


@triton.jit
def _grad_kv(
    Q, K, V, GRAD, LSE, DELTA, DK, DV_OUT, KEY_TILES,
    stride_qr, stride_qh, stride_kr, stride_kh, stride_vr, stride_vh, stride_gr, stride_gh,
    stride_dkr, stride_dkh, stride_dvr, stride_dvh, rows, scale, scale2, group, window, dim, dim_v,
    PACK: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One tile of keys over the queries that see it. KEY_TILES: int32 [tiles, 3], (first row of the sequence,
    its length, the tile's first position)."""
    tile = KEY_TILES + tl.program_id(0) * 3
    sequence, length, first = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    kv = tl.program_id(1)
    offs_m, offs_n = tl.arange(0, BLOCK), tl.arange(0, KEYS)
    offs_1, offs_v = tl.arange(0, D1), tl.arange(0, DV)
    at_k = first + offs_n
    inside = at_k < length
    k_at = K + (sequence + at_k)[:, None] * stride_kr + kv * stride_kh
    k1 = tl.load(k_at + offs_1[None, :], mask=inside[:, None] & (offs_1 < dim)[None, :], other=0.0)
    dk1 = tl.zeros([KEYS, D1], tl.float32)
    if D2 > 0:
        offs_2 = D1 + tl.arange(0, D2)
        k2 = tl.load(k_at + offs_2[None, :], mask=inside[:, None] & (offs_2 < dim)[None, :], other=0.0)
        dk2 = tl.zeros([KEYS, D2], tl.float32)
    v_at = V + (sequence + at_k)[:, None] * stride_vr + kv * stride_vh + offs_v[None, :]
    v = tl.load(v_at, mask=inside[:, None] & (offs_v < dim_v)[None, :], other=0.0)
    dv = tl.zeros([KEYS, DV], tl.float32)
    step = BLOCK // PACK
    stop = length
    if WINDOW:
        stop = tl.minimum(length, first + KEYS - 1 + window)
    for part in range(0, tl.cdiv(group, PACK)):
        own = part * PACK + offs_m % PACK
        head = kv * group + own
        for m in range(first // step * step, stop, step):
            at = m + offs_m // PACK
            real = (at < length) & (own < group)
            q_at = Q + (sequence + at)[None, :] * stride_qr + head[None, :] * stride_qh
            q1 = tl.load(q_at + offs_1[:, None], mask=real[None, :] & (offs_1 < dim)[:, None], other=0.0)
            s = dot(k1, q1, tl.zeros([KEYS, BLOCK], tl.float32), EXACT)
            if D2 > 0:
                q2 = tl.load(q_at + offs_2[:, None], mask=real[None, :] & (offs_2 < dim)[:, None], other=0.0)
                s = dot(k2, q2, s, EXACT)
            lse = tl.load(LSE + head.to(tl.int64) * rows + sequence + at, mask=real, other=0.0)
            delta = tl.load(DELTA + head.to(tl.int64) * rows + sequence + at, mask=real, other=0.0)
            seen = (at_k[:, None] <= at[None, :]) & real[None, :]
            if WINDOW:
                seen &= at_k[:, None] > at[None, :] - window
            p = tl.where(seen, tl.exp2(s * scale2 - lse[None, :]), 0.0)
            g_at = GRAD + (sequence + at)[:, None] * stride_gr + head[:, None] * stride_gh + offs_v[None, :]
            grad = tl.load(g_at, mask=real[:, None] & (offs_v < dim_v)[None, :], other=0.0)
            dv = dot(p.to(grad.dtype), grad, dv, EXACT)
            dp = dot(v, tl.trans(grad), tl.zeros([KEYS, BLOCK], tl.float32), EXACT)
            ds = (p * (dp - delta[None, :])).to(q1.dtype)
            dk1 = dot(ds, tl.trans(q1), dk1, EXACT)
            if D2 > 0:
                dk2 = dot(ds, tl.trans(q2), dk2, EXACT)
    to = DK + (sequence + at_k)[:, None] * stride_dkr + kv * stride_dkh
    tl.store(
        to + offs_1[None, :],
        (dk1 * scale).to(DK.dtype.element_ty),
        mask=inside[:, None] & (offs_1 < dim)[None, :],
    )
    if D2 > 0:
        tl.store(
            to + offs_2[None, :],
            (dk2 * scale).to(DK.dtype.element_ty),
            mask=inside[:, None] & (offs_2 < dim)[None, :],
        )
    to = DV_OUT + (sequence + at_k)[:, None] * stride_dvr + kv * stride_dvh + offs_v[None, :]
    tl.store(to, dv.to(DV_OUT.dtype.element_ty), mask=inside[:, None] & (offs_v < dim_v)[None, :])


def packed_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, spans: Packed, scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v (see triton_attention.packed_forward), zeros outside of the spans.

    out: [rows, Hq, Dv], lse: fp32 [Hq, rows] to the base of 2, grad: [rows, Hq, Dv], last dimension dense.
    Returns views [heads, rows, dim] of tensors that lie as [rows, heads, dim].
    """
    shape, heads, rows = Shape.of(q, v, k.shape[0]), q.shape[0], q.shape[1]
    delta = lse.new_empty(heads, rows)
    pairs = 1024 if INTERPRETED else 16
    _delta[(-(-rows * heads // pairs),)](
        out, grad, delta, *out.stride()[:2], *grad.stride()[:2], heads, rows, v.shape[-1], pairs, shape.value
    )
    dq, dk, dv = (x.new_zeros(x.shape[1], x.shape[0], x.shape[2]) for x in (q, k, v))
    strides = [n for x in (q, k, v) for n in (x.stride(1), x.stride(0))] + list(grad.stride()[:2])
    numbers = (rows, scale, scale * _LOG2E, shape.group, window or 0, q.shape[-1], v.shape[-1])
    blocks = (
        shape.pack, shape.first, shape.second, shape.value, ROWS, KEYS, window is not None, exact_dot(q.dtype)
    )  # fmt: skip
    dim = shape.first + shape.second
    how = {"num_warps": 8 if dim >= 128 else 4, "num_stages": 1 if dim > 128 else 2}
    _grad_q[(len(spans.tiles), k.shape[0] * shape.parts)](
        q, k, v, grad, lse, delta, dq, spans.tiles, *strides, *dq.stride()[:2], *numbers, *blocks,
        **how,
    )  # fmt: skip
    _grad_kv[(len(spans.key_tiles), k.shape[0])](
        q, k, v, grad, lse, delta, dk, dv, spans.key_tiles, *strides, *dk.stride()[:2], *dv.stride()[:2],
        *numbers, *blocks, **how,
    )  # fmt: skip
    return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)
