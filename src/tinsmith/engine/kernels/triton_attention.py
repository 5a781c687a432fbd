"""Causal attention in Triton: packed sequences in training, pages of a cache in sampling, one kernel for
both.

Blocks of KEYS keys are taken in order from the sequence's beginning, with a running maximum (Milakov and
Gimelshein 2018; Dao 2023). A block that a query does not see changes nothing of its sums, bit for bit, so
that a query's result depends on that query and its keys alone, and is the same in a training pass, a chunk of
a prompt and a decode step. `decode` alone divides a sequence's keys among programs, which is faster where few
sequences are long, and adds the parts in another order: it is not used under --deterministic.

The query heads of a key-value head stand together in a block's rows (row = position * PACK + head), so that
keys and values are loaded once for all of them. Sinks are logits that take part in the normalization alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinsmith.engine.kernels.triton_common import dot, exact_dot, power, table

KEYS = 64  # keys of a block, and of a page
ROWS = 64  # query rows of a block
_LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Shape:
    """How heads are laid out in blocks: the key dim in two parts of powers of two (so that 192 is no 256)."""

    group: int  # query heads of a key-value head
    pack: int  # of those, how many stand in one block's rows
    first: int
    second: int  # 0 where one part holds it all
    value: int

    @classmethod
    def of(cls, q: Tensor, v: Tensor, kv_heads: int, *, single: bool = False) -> Shape:
        """For blocks of many positions, which no head leaves rows of empty; or of a `single` one."""
        group, dim = q.shape[0] // kv_heads, q.shape[-1]
        first = power(dim) if power(dim) == dim or dim <= 16 else power(dim) // 2
        second = 0 if first >= dim else power(dim - first)
        pack = min(power(group, 1), ROWS) if single else pack_of(group)
        return cls(group, pack, first, second, power(v.shape[-1]))

    @property
    def parts(self) -> int:
        """Blocks that a key-value head's query heads take."""
        return -(-self.group // self.pack)


def pack_of(group: int) -> int:
    """The largest power of two that divides `group`, 16 at most."""
    return min(group & -group, 16)


@triton.jit
def _keys(K, page, row, n, offs_n, kv, offs_d, stride_p, stride_r, stride_h, bound, DIM, PAGED: tl.constexpr):
    """A block of keys, transposed: [D, KEYS]; zeros beyond `bound`."""
    at = page * stride_p + offs_n * stride_r if PAGED else (row + n + offs_n) * stride_r
    seen = (n + offs_n < bound)[None, :] & (offs_d < DIM)[:, None]
    return tl.load(K + at[None, :] + kv * stride_h + offs_d[:, None], mask=seen, other=0.0)


@triton.jit
def _values(
    V, page, row, n, offs_n, kv, offs_d, stride_p, stride_r, stride_h, bound, DIM, PAGED: tl.constexpr
):
    """A block of values: [KEYS, D]; zeros beyond `bound`."""
    at = page * stride_p + offs_n * stride_r if PAGED else (row + n + offs_n) * stride_r
    seen = (n + offs_n < bound)[:, None] & (offs_d < DIM)[None, :]
    return tl.load(V + at[:, None] + kv * stride_h + offs_d[None, :], mask=seen, other=0.0)


@triton.jit
def _forward(
    Q, K, V, OUT, LSE, SINKS, TILES, PAGES, PARTS,
    stride_qr, stride_qh, stride_kp, stride_kr, stride_kh, stride_vp, stride_vr, stride_vh,
    stride_or, stride_oh, stride_pages, stride_lse, stride_part, scale2, group, window, dim, dim_v, splits,
    PACK: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, PAGED: tl.constexpr, WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
    KEEP_LSE: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One tile of query rows over its keys.

    TILES: int32 [tiles, 4], (first row of q, positions, first position, sequence); the sequence is a row of
    PAGES, or where its keys begin in K. A tile without positions is none. With SPLIT the keys are divided
    into `splits` runs of blocks, and what comes out goes to PARTS: fp32 [splits, rows, heads, DV + 2], the
    sums, the maximum and the total.
    """
    tile = TILES + tl.program_id(0) * 4
    row, count = tl.load(tile).to(tl.int64), tl.load(tile + 1)
    first, sequence = tl.load(tile + 2), tl.load(tile + 3).to(tl.int64)
    if count == 0:
        return
    parts = tl.cdiv(group, PACK)
    kv = tl.program_id(1) // parts
    offs_m, offs_n = tl.arange(0, BLOCK), tl.arange(0, KEYS)
    offs_1, offs_v = tl.arange(0, D1), tl.arange(0, DV)
    head = (tl.program_id(1) % parts) * PACK + offs_m % PACK
    place = offs_m // PACK
    real = (place < count) & (head < group)
    head = kv * group + head
    at = first + place  # positions
    q_at = Q + (row + place)[:, None] * stride_qr + head[:, None] * stride_qh
    q1 = tl.load(q_at + offs_1[None, :], mask=real[:, None] & (offs_1 < dim)[None, :], other=0.0)
    if D2 > 0:
        offs_2 = D1 + tl.arange(0, D2)
        q2 = tl.load(q_at + offs_2[None, :], mask=real[:, None] & (offs_2 < dim)[None, :], other=0.0)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, DV], tl.float32)
    stop = first + count
    start = 0
    if WINDOW:
        start = tl.maximum(0, first - window + 1) // KEYS * KEYS
    if SPLIT:
        # Whole blocks for each part; the last ones may have none.
        each = tl.cdiv(tl.cdiv(stop - start, KEYS), splits) * KEYS
        start = start + tl.program_id(2) * each
        stop = tl.minimum(stop, start + each)
    for n in range(start, stop, KEYS):
        page = tl.load(PAGES + sequence * stride_pages + n // KEYS).to(tl.int64) if PAGED else 0
        k = _keys(K, page, sequence, n, offs_n, kv, offs_1, stride_kp, stride_kr, stride_kh, stop, dim, PAGED)
        s = dot(q1, k, tl.zeros([BLOCK, KEYS], tl.float32), EXACT)
        if D2 > 0:
            k = _keys(
                K, page, sequence, n, offs_n, kv, offs_2, stride_kp, stride_kr, stride_kh, stop, dim, PAGED
            )
            s = dot(q2, k, s, EXACT)
        s *= scale2
        seen = (n + offs_n)[None, :] <= at[:, None]
        if WINDOW:
            seen &= (n + offs_n)[None, :] > at[:, None] - window
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = _values(
            V, page, sequence, n, offs_n, kv, offs_v, stride_vp, stride_vr, stride_vh, stop, dim_v, PAGED
        )
        acc = dot(p.to(v.dtype), v, acc, EXACT)
        top = new
    if SPLIT:
        heads = tl.num_programs(1) // parts * group
        to = PARTS + tl.program_id(2) * stride_part + ((row + place) * heads + head) * (DV + 2)
        tl.store(to[:, None] + offs_v[None, :], acc, mask=real[:, None])
        tl.store(to + DV, top, mask=real)
        tl.store(to + DV + 1, total, mask=real)
    else:
        if HAS_SINKS:
            sink = tl.load(SINKS + head, mask=real, other=0.0) * 1.4426950408889634
            new = tl.maximum(top, sink)
            shrink = tl.exp2(top - new)
            total = total * shrink + tl.exp2(sink - new)
            acc = acc * shrink[:, None]
            top = new
        total = tl.where(total == 0.0, 1.0, total)
        to = OUT + (row + place)[:, None] * stride_or + head[:, None] * stride_oh + offs_v[None, :]
        tl.store(
            to,
            (acc / total[:, None]).to(OUT.dtype.element_ty),
            mask=real[:, None] & (offs_v < dim_v)[None, :],
        )
        if KEEP_LSE:  # to the base of 2, as backward wants it
            tl.store(LSE + head * stride_lse + row + place, top + tl.log2(total), mask=real)


@triton.jit
def _combine(
    PARTS, OUT, SINKS, TILES, stride_part, stride_or, stride_oh, heads, dim_v, splits,
    DV: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Add the parts of one row and head, in their order."""
    row, count = tl.load(TILES + tl.program_id(0) * 4).to(tl.int64), tl.load(TILES + tl.program_id(0) * 4 + 1)
    if count == 0:
        return
    head, offs_v = tl.program_id(1), tl.arange(0, DV)
    at = PARTS + (row * heads + head) * (DV + 2)
    top = float("-inf")
    total, acc = 0.0, tl.zeros([DV], tl.float32)
    if HAS_SINKS:
        top = tl.load(SINKS + head) * 1.4426950408889634
        total = 1.0
    for part in range(0, splits):
        of = at + part * stride_part
        own = tl.load(of + DV)
        new = tl.maximum(top, own)
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - safe) + tl.load(of + DV + 1) * tl.exp2(own - safe)
        acc = acc * tl.exp2(top - safe) + tl.load(of + offs_v) * tl.exp2(own - safe)
        top = new
    to = OUT + row * stride_or + head * stride_oh + offs_v
    tl.store(to, (acc / total).to(OUT.dtype.element_ty), mask=offs_v < dim_v)


@triton.jit
def _write(
    K, V, KEY_PAGES, VALUE_PAGES, SLOTS,
    stride_kr, stride_kh, stride_vr, stride_vh, stride_kp, stride_vp, heads, dim, dim_v,
    D: tl.constexpr, DV: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Put one row's keys and values where they belong. SLOTS: int64 [rows], page * KEYS + place, or -1.
    Pages are dense [pages, KEYS, heads, dim]; stride_kp and stride_vp are of one place."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(SLOTS + row)
    if slot < 0:
        return
    head = tl.arange(0, HEADS)[:, None]
    offs = tl.arange(0, D)[None, :]
    real = (head < heads) & (offs < dim)
    x = tl.load(K + row * stride_kr + head * stride_kh + offs, mask=real)
    tl.store(KEY_PAGES + slot * stride_kp + head * dim + offs, x, mask=real)
    offs = tl.arange(0, DV)[None, :]
    real = (head < heads) & (offs < dim_v)
    x = tl.load(V + row * stride_vr + head * stride_vh + offs, mask=real)
    tl.store(VALUE_PAGES + slot * stride_vp + head * dim_v + offs, x, mask=real)


class Packed:
    """Where whole sequences lie in packed rows, as the kernels want it. spans: (first row, length) of
    each."""

    def __init__(self, spans: Sequence[tuple[int, int]], group: int, device: torch.device) -> None:
        step = ROWS // pack_of(group)
        self.tiles = table(
            [
                (start + at, min(step, length - at), at, start)
                for start, length in spans
                # The longest tiles first: what is left for the end is small.
                for at in range((length - 1) // step * step, -1, -step)
            ],
            device,
        )
        self.key_tiles = table(
            [(start, length, at) for start, length in spans for at in range(0, length, KEYS)], device
        )


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, scale: float, window: int | None, sinks: Tensor | None,
    *, keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention over packed rows.

    q: [Hq, rows, Dk], k: [Hkv, rows, Dk], v: [Hkv, rows, Dv], last dimensions dense; tiles: Packed's; sinks:
    fp32 [Hq]. Returns [rows, Hq, Dv], zeros outside of the spans, and with `keep` the log-sum-exp to the
    base of 2, fp32 [Hq, rows].
    """
    shape, out = Shape.of(q, v, k.shape[0]), q.new_zeros(q.shape[1], q.shape[0], v.shape[-1])
    lse = torch.zeros(q.shape[:2], dtype=torch.float32, device=q.device) if keep else None
    _launch(q, k, v, out, lse, tiles, None, shape, scale, window, sinks, (0, *_strides(k)), (0, *_strides(v)))
    return out, lse


def paged_forward(
    q: Tensor, keys: Tensor, values: Tensor, tiles: Tensor, pages: Tensor, out: Tensor, scale: float,
    window: int | None, sinks: Tensor | None,
) -> None:  # fmt: skip
    """Attention of the tiles' rows over pages, into `out` [rows, Hq, Dv].

    keys: [pages, KEYS, Hkv, Dk], values alike; tiles: int32 [tiles, 4] with a row of `pages`, int32
    [sequences, pages of the longest], for the sequence.
    """
    shape = Shape.of(q, values, keys.shape[2])
    _launch(
        q, keys, values, out, None, tiles, pages, shape, scale, window, sinks,
        keys.stride()[:3], values.stride()[:3],
    )  # fmt: skip


def decode(
    q: Tensor, keys: Tensor, values: Tensor, tiles: Tensor, pages: Tensor, out: Tensor, scale: float,
    window: int | None, sinks: Tensor | None, splits: int,
) -> None:  # fmt: skip
    """As paged_forward for tiles of single rows, each one's keys divided among `splits` programs."""
    shape = Shape.of(q, values, keys.shape[2], single=True)
    if splits == 1:
        _launch(
            q, keys, values, out, None, tiles, pages, shape, scale, window, sinks,
            keys.stride()[:3], values.stride()[:3], rows=max(16, shape.pack),
        )  # fmt: skip
        return
    parts = q.new_empty(splits, q.shape[1], q.shape[0], shape.value + 2, dtype=torch.float32)
    _launch(
        q, keys, values, out, None, tiles, pages, shape, scale, window, sinks,
        keys.stride()[:3], values.stride()[:3], rows=max(16, shape.pack), splits=splits, parts=parts,
    )  # fmt: skip
    _combine[(len(tiles), q.shape[0])](
        parts, out, sinks, tiles, parts.stride(0), *out.stride()[:2], q.shape[0], values.shape[-1], splits,
        shape.value, sinks is not None,
    )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, int]:
    """(row, head) of [heads, rows, dim]."""
    return x.stride(1), x.stride(0)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, tiles: Tensor, pages: Tensor | None,
    shape: Shape, scale: float, window: int | None, sinks: Tensor | None, key_strides: tuple[int, ...],
    value_strides: tuple[int, ...], *, rows: int = ROWS, splits: int = 0, parts: Tensor | None = None,
) -> None:  # fmt: skip
    heads = q.shape[0] // shape.group
    grid = (len(tiles), heads * shape.parts, max(1, splits))
    wide = shape.first + shape.second > 128
    _forward[grid](
        q, k, v, out, lse, sinks, tiles, pages, parts,
        *_strides(q), *key_strides, *value_strides, *out.stride()[:2],
        0 if pages is None else pages.stride(0), 0 if lse is None else lse.stride(0),
        0 if parts is None else parts.stride(0), scale * _LOG2E, shape.group, window or 0, q.shape[-1],
        v.shape[-1], splits,
        shape.pack, shape.first, shape.second, shape.value, rows, KEYS, pages is not None, window is not None,
        sinks is not None, lse is not None, splits > 0, exact_dot(q.dtype),
        num_warps=4, num_stages=2 if wide or q.dtype is torch.float32 else 3,
    )  # fmt: skip


def write(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Put rows' keys [Hkv, rows, Dk] and values into pages (see paged_forward) at `slots`, int64 [rows]:
    page * KEYS + place, or -1 for rows that have none."""
    _write[(k.shape[1],)](
        k, v, keys, values, slots, *_strides(k), *_strides(v), keys.stride(1), values.stride(1), k.shape[0],
        k.shape[-1], v.shape[-1], power(k.shape[-1]), power(v.shape[-1]), power(k.shape[0], 1),
    )  # fmt: skip
