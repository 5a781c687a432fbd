"""Causal attention whose result for a query depends on that query and its keys alone.

torch's fused CPU attention gives a query other bits when it stands beside others, so a decoded token
would not reproduce the trainer's logprob. Here every product has a fixed shape per query: keys come
in pages of PAGE, query rows in multiples of PADDING.rows, scores are fp32, the maximum is exact, and the
pages' partial sums are added in page order. A page that a query does not see adds exact zeros. So a
query has the same bits in a training pass, a chunk of a prefill and a decode step, whatever stands
beside it.

Used by the trainer over whole sequences and by the sampler over cached pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PAGE = 64  # keys in a page
TILE = 256  # query positions of one sequence that are worked on at a time: bounds the scores in memory


@dataclass(slots=True)
class Padding:
    """Rows of a product stand in multiples of `rows`: this process's one setting, which the engine settles
    at start (exactness.py), before anything is padded."""

    rows: int = 16


PADDING = Padding()


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def pad_rows(n: int) -> int:
    """`n` rounded up to what rows (and ranks) are padded to."""
    return round_up(n, PADDING.rows)


def _scores(q: Tensor, k: Tensor, q_pos: Tensor, scale: float, window: int | None, first_page: int) -> Tensor:
    """Masked scores [B, Hkv, NB, R, PAGE], fp32. See `attend` for the arguments."""
    pages, page = k.shape[2], k.shape[3]
    b, h, r, d = q.shape
    s = torch.matmul(q.unsqueeze(2).expand(b, h, pages, r, d), k.transpose(-1, -2))
    s *= scale
    key_pos = torch.arange(first_page * page, (first_page + pages) * page, device=q.device).view(
        1, pages, 1, page
    )
    row_pos = q_pos.view(b, 1, r, 1)
    hidden = key_pos > row_pos
    if window is not None:
        hidden |= key_pos <= row_pos - window
    return s.masked_fill_(hidden.unsqueeze(1), float("-inf"))


def _sum_pages(x: Tensor) -> Tensor:
    """Sum over dim 2, page after page: the order must not depend on how many pages there are."""
    total = x[:, :, 0].clone()
    for page in range(1, x.shape[2]):
        total += x[:, :, page]
    return total


def _softmax_parts(s: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(exp(s - max), max, sum of the exponentials); rows that see nothing get zeros and a sum of 1."""
    top = s.amax(dim=(2, 4))  # [B, Hkv, R]
    if sinks is not None:
        top = torch.maximum(top, sinks)
    top = torch.where(top == float("-inf"), torch.zeros_like(top), top)
    p = s.sub_(top[:, :, None, :, None]).exp_()
    total = _sum_pages(p.sum(-1))
    if sinks is not None:
        total = total + (sinks - top).exp()
    total = torch.where(total == 0, torch.ones_like(total), total)
    return p, top, total


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    first_page: int = 0,
) -> Tensor:
    """Attention of query rows over pages of keys; row r of sequence b sees keys at positions <= q_pos[b, r].

    q: [B, Hkv, R, Dk], the query heads of a key-value head and the positions together in R, a
    multiple of PADDING.rows. k: [B, Hkv, NB, PAGE, Dk], v: [B, Hkv, NB, PAGE, Dv]; key j of page n stands at
    position (first_page + n) * PAGE + j. q_pos: int64 [B, R], -1 for padding. window: how many last
    positions a query sees, itself included. sinks: fp32 [B or 1, Hkv, R] extra logits that take part in the
    normalization alone. All fp32. Returns [B, Hkv, R, Dv].
    """
    p, _, total = _softmax_parts(_scores(q, k, q_pos, scale, window, first_page), sinks)
    out = _sum_pages(torch.matmul(p, v))
    return out / total.unsqueeze(-1)


class PackedAttention(torch.autograd.Function):
    """Block-diagonal causal attention over a batch of sequences of one padded length.

    Forward keeps q, k, v and the two row statistics; the scores are made again in backward, a tile
    of queries at a time, so that memory grows with TILE times the length.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, sinks: Tensor | None
    ) -> Tensor:
        """q: [B, Hq, L, Dk], k: [B, Hkv, L, Dk], v: [B, Hkv, L, Dv], L a multiple of PAGE, any one float
        dtype; padding is at the end of a sequence. Returns [B, Hq, L, Dv] in q's dtype."""
        ctx.save_for_backward(q, k, v, sinks)
        ctx.scale, ctx.window = scale, window
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        for start, stop, first, last, tile, sink_rows, pos in _tiles(q, k, window, sinks):
            kk, vv = _pages(k, first, last), _pages(v, first, last)
            o = attend(tile, kk, vv, pos, scale, window, sink_rows, first)
            out[:, :, start:stop] = o.unflatten(2, (-1, stop - start)).flatten(1, 2).to(out.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grads
        q, k, v, sinks = ctx.saved_tensors
        hkv, group = k.shape[1], q.shape[1] // k.shape[1]
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        dk = torch.zeros(k.shape, dtype=torch.float32, device=q.device)
        dv = torch.zeros(v.shape, dtype=torch.float32, device=q.device)
        for start, stop, first, last, tile, sink_rows, pos in _tiles(q, k, ctx.window, sinks):
            kk, vv = _pages(k, first, last), _pages(v, first, last)
            p, _, total = _softmax_parts(_scores(tile, kk, pos, ctx.scale, ctx.window, first), sink_rows)
            p /= total[:, :, None, :, None]
            do = grad_out[:, :, start:stop].unflatten(1, (hkv, group)).flatten(2, 3).float()
            do_pages = do.unsqueeze(2).expand(*do.shape[:2], last - first, *do.shape[2:])
            dv[:, :, first * PAGE : last * PAGE] += torch.matmul(p.transpose(-1, -2), do_pages).flatten(2, 3)
            dp = torch.matmul(do_pages, vv.transpose(-1, -2))
            # d(softmax): p * (dp - sum over keys of p * dp)
            row = _sum_pages((p * dp).sum(-1))
            ds = dp.sub_(row[:, :, None, :, None]).mul_(p).mul_(ctx.scale)
            dk[:, :, first * PAGE : last * PAGE] += torch.matmul(
                ds.transpose(-1, -2), tile.unsqueeze(2).expand(*tile.shape[:2], last - first, *tile.shape[2:])
            ).flatten(2, 3)
            dq_tile = _sum_pages(torch.matmul(ds, kk))
            dq[:, :, start:stop] = dq_tile.unflatten(2, (group, -1)).flatten(1, 2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _pages(x: Tensor, first: int, last: int) -> Tensor:
    """[B, H, L, D] -> fp32 pages [B, H, last - first, PAGE, D]."""
    return x[:, :, first * PAGE : last * PAGE].float().unflatten(2, (-1, PAGE))


def _tiles(q: Tensor, k: Tensor, window: int | None, sinks: Tensor | None) -> Any:
    """The query tiles of a sequence: (start, stop, first page, last page, fp32 rows [B, Hkv, R, D],
    sinks per row, positions [B, R])."""
    b, hq, length, _ = q.shape
    hkv = k.shape[1]
    group = hq // hkv
    for start in range(0, length, TILE):
        stop = min(start + TILE, length)
        first = 0 if window is None else max(0, (start - window + 1) // PAGE)
        last = stop // PAGE if stop % PAGE == 0 else stop // PAGE + 1
        rows = q[:, :, start:stop].unflatten(1, (hkv, group)).flatten(2, 3).float()
        pos = torch.arange(start, stop, device=q.device).repeat(group).expand(b, -1)
        sink_rows = None
        if sinks is not None:
            sink_rows = sinks.float().view(1, hkv, group, 1).expand(1, hkv, group, stop - start).flatten(2, 3)
        yield start, stop, first, last, rows, sink_rows, pos
