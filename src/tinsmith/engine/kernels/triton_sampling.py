"""From logits to tokens in Triton: a program a row, nothing sorted and nothing copied to the host.

top_k and top_p keep the tokens above a threshold, which is found bit by bit on the logits themselves; of
those that lie on it, the first ones by index, as a stable sort would. The draw is the inverse of the running
sum of what is kept, in order of the ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinsmith.engine.kernels.triton_common import INTERPRETED

_N = 512 if INTERPRETED else 4096  # logits of a row that are worked on at a time


@triton.jit
def _load(X, at, n, vocab, N: tl.constexpr):
    offs = n + tl.arange(0, N)
    return tl.load(X + at + offs, mask=offs < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def _keys(x):
    """fp32 -> int64 from 0 to 2^32 - 1, in the same order."""
    bits = x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return tl.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)


@triton.jit
def _weights(x, by, top):
    return tl.exp(tl.div_rn(x, by) - top)


@triton.jit
def _above(X, at, vocab, by, top, key, N: tl.constexpr):
    """How many tokens have a key of at least `key`, and their weight."""
    count, mass = tl.full([], 0, tl.int64), tl.full([], 0.0, tl.float64)
    for n in range(0, vocab, N):
        x = _load(X, at, n, vocab, N)
        kept = (_keys(x) >= key) & (n + tl.arange(0, N) < vocab)
        count += tl.sum(kept.to(tl.int32), 0)
        mass += tl.sum(tl.where(kept, _weights(x, by, top), 0.0), 0).to(tl.float64)
    return count, mass


@triton.jit
def _kept(x, n, least, ties, seen, vocab, N: tl.constexpr):
    """Which tokens of a block are kept: those above `least`, and of those on it the first `ties`, of which
    `seen` have been met."""
    key = _keys(x)
    on = ((key == least) & (n + tl.arange(0, N) < vocab)).to(tl.int32)
    return (key > least) | ((on > 0) & (seen + tl.cumsum(on, 0) <= ties)), tl.sum(on, 0)


@triton.jit
def _choose(
    X, SOURCES, TEMPERATURES, TOP_K, TOP_P, DRAWS, TOKENS, vocab, stride, BITS: tl.constexpr, N: tl.constexpr
):
    i = tl.program_id(0)
    at = tl.load(SOURCES + i) * stride
    temperature = tl.load(TEMPERATURES + i)
    offs = tl.arange(0, N)
    # The largest logit, and the first token that has it.
    top, best = tl.full([], float("-inf"), tl.float32), tl.full([], 0, tl.int32)
    for n in range(0, vocab, N):
        x = _load(X, at, n, vocab, N)
        own = tl.max(x, 0)
        best = tl.where(own > top, tl.min(tl.where(x == own, n + offs, vocab), 0), best)
        top = tl.maximum(top, own)
    if temperature == 0.0:
        tl.store(TOKENS + i, best.to(tl.int64))
        return
    by = temperature
    top = tl.div_rn(top, by)
    k, p = tl.load(TOP_K + i).to(tl.int64), tl.load(TOP_P + i)
    everything = tl.full([], 1, tl.int64) << 40
    # What has a key below `least` is cut; of what lies on it, the first `ties` are kept.
    least, ties = tl.full([], 0, tl.int64), everything
    if (k > 0) & (k < vocab):
        for bit in range(0, BITS):
            trial = least | (tl.full([], 0x80000000, tl.int64) >> bit)
            count, _ = _above(X, at, vocab, by, top, trial, N)
            least = tl.where(count >= k, trial, least)
        over, _ = _above(X, at, vocab, by, top, least + 1, N)
        ties = k - over
    if p < 1.0:
        # The weight of what top_k keeps, its ties in part.
        count, mass = _above(X, at, vocab, by, top, least, N)
        over, above = _above(X, at, vocab, by, top, least + 1, N)
        on = (count - over).to(tl.float64)
        mass = above + (mass - above) * tl.minimum(ties.to(tl.float64), on) / tl.maximum(on, 1.0)
        wanted = mass * p.to(tl.float64)
        bound = least
        least = tl.full([], 0, tl.int64)
        for bit in range(0, BITS):
            trial = least | (tl.full([], 0x80000000, tl.int64) >> bit)
            _, above = _above(X, at, vocab, by, top, trial, N)
            least = tl.where(above >= wanted, trial, least)
        least = tl.maximum(least, bound)
        count, mass = _above(X, at, vocab, by, top, least, N)
        over, above = _above(X, at, vocab, by, top, least + 1, N)
        one = (mass - above) / tl.maximum((count - over).to(tl.float64), 1.0)  # a token on the threshold
        needed = tl.where(one > 0.0, tl.ceil((wanted - above) / tl.where(one > 0.0, one, 1.0)), 1.0)
        needed = tl.maximum(needed, 1.0).to(tl.int64)
        ties = tl.where(least == bound, tl.minimum(ties, needed), needed)
    total, seen = tl.full([], 0.0, tl.float64), tl.full([], 0, tl.int64)
    for n in range(0, vocab, N):
        x = _load(X, at, n, vocab, N)
        kept, on = _kept(x, n, least, ties, seen, vocab, N)
        total += tl.sum(tl.where(kept, _weights(x, by, top), 0.0), 0).to(tl.float64)
        seen += on
    target = total * tl.load(DRAWS + i)
    before, seen = tl.full([], 0.0, tl.float64), tl.full([], 0, tl.int64)
    # Rounding may put the draw at the very end: the last token that has any weight then.
    token, last = tl.full([], 1 << 30, tl.int32), best
    for n in range(0, vocab, N):
        x = _load(X, at, n, vocab, N)
        kept, on = _kept(x, n, least, ties, seen, vocab, N)
        w = tl.where(kept, _weights(x, by, top), 0.0)
        passed = (before + tl.cumsum(w, 0).to(tl.float64) > target) & (w > 0.0)
        token = tl.minimum(token, tl.min(tl.where(passed, n + offs, 1 << 30), 0))
        last = tl.maximum(last, tl.max(tl.where(w > 0.0, n + offs, 0), 0))
        before += tl.sum(w, 0).to(tl.float64)
        seen += on
    tl.store(TOKENS + i, tl.where(token < vocab, token, last).to(tl.int64))


def choose(
    logits: Tensor, sources: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, draws: Tensor
) -> Tensor:
    """A token for each of n samples, int64 [n].

    logits: [rows, vocab], last dimension dense; all others [n]: sources int64, the row of each; temperatures
    fp32, 0 for the most likely token; top_k int32, 0 or -1 for all; top_p fp32; draws fp64 in [0, 1).
    """
    tokens = torch.empty_like(sources)
    _choose[(len(sources),)](
        logits, sources, temperatures, top_k, top_p, draws, tokens, logits.shape[1], logits.stride(0),
        16 if logits.dtype is torch.bfloat16 else 32, _N, num_warps=8,
    )  # fmt: skip
    return tokens
