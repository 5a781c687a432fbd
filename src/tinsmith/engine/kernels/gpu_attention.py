"""Attention on a GPU: packed sequences in training, pages in sampling.

Training takes torch's kernels where they suit (flash.py), else ours; sampling takes ours, which have pages of
any length. Under --deterministic one kernel does all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tinsmith.engine.kernels import flash, gpu
from tinsmith.engine.kernels.triton_attention import (
    KEYS,
    ROWS,
    Packed,
    decode,
    pack_of,
    packed_forward,
    paged_forward,
    write,
)
from tinsmith.engine.kernels.triton_attention_backward import packed_backward
from tinsmith.engine.kernels.triton_common import table

_PART = 256  # keys that are worth a program of their own in a decode step


class Spans:
    """Where whole sequences lie in packed rows: (first row, length) of each."""

    def __init__(self, spans: Sequence[tuple[int, int]], rows: int, device: torch.device) -> None:
        self._spans, self._rows, self._device = list(spans), rows, device
        self._packed: dict[int, Packed] = {}

    def packed(self, group: int) -> Packed:
        """As our kernels want it, for `group` query heads to a key-value head."""
        pack = pack_of(group)
        if pack not in self._packed:
            self._packed[pack] = Packed(self._spans, group, self._device)
        return self._packed[pack]

    @functools.cached_property
    def flash(self) -> flash.Spans:
        return flash.Spans(self._spans, self._rows, self._device)


class SpanAttention(torch.autograd.Function):
    """Block-diagonal causal attention over packed rows, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spans: Spans,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """q: [Hq, rows, Dk], k: [Hkv, rows, Dk], v: [Hkv, rows, Dv] -> [rows, Hq, Dv]; what stands outside of
        the spans is finite. sinks: [Hq] extra logits that take part in the normalization alone."""
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        sinks = None if sinks is None else sinks.detach().float().contiguous()
        ctx.spans, ctx.scale, ctx.window = spans, scale, window
        ctx.by_torch = flash.suits(q, v, window, sinks)
        if ctx.by_torch:
            tensors = flash.forward(*_by_rows(q, k, v), spans.flash, scale, window, sinks)
            ctx.save_for_backward(q, k, v, *tensors)
            return tensors[0]
        packed = spans.packed(q.shape[0] // k.shape[0])
        keep = any(ctx.needs_input_grad)
        out, lse = packed_forward(q, k, v, packed.tiles, scale, window, sinks, keep=keep)
        if lse is not None:
            ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *rest = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        if ctx.by_torch:
            found = flash.backward(
                grad, *_by_rows(q, k, v), out, lse, rest[0], rest[1], ctx.spans.flash, ctx.scale, ctx.window
            )
            dq, dk, dv = _by_rows(*found)
        else:
            packed = ctx.spans.packed(q.shape[0] // k.shape[0])
            dq, dk, dv = packed_backward(q, k, v, out, lse, grad, packed, ctx.scale, ctx.window)
        return dq, dk, dv, None, None, None, None


def _by_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[heads, rows, dim] <-> [rows, heads, dim]."""
    return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)


class Pages:
    """A sampling step's rows and their pages.

    slots: int64 [rows], where a row's keys go: page * KEYS + place, or -1; pages: int32 [chunks, pages of the
    longest]; singles: int32 [chunks of one row, 4], as triton_attention wants tiles, or None; longer: the
    other chunks, (first row, length, first position, row of `pages`) each; longest: keys of the longest
    chunk.
    """

    def __init__(
        self,
        slots: Tensor,
        pages: Tensor,
        singles: Tensor | None,
        longer: Sequence[tuple[int, int, int, int]],
        longest: int,
    ) -> None:
        self.slots, self.pages, self.singles = slots, pages, singles
        self._longer, self._longest = longer, longest
        self._tiles: dict[int, Tensor] = {}

    @classmethod
    def of(
        cls, chunks: Sequence[tuple[int, int, int, Sequence[int]]], rows: int, device: torch.device
    ) -> Pages:
        """chunks: (first row, length, first position, pages) each."""
        slots = torch.full((rows,), -1, dtype=torch.int64)
        width = max(len(own) for *_, own in chunks)
        pages = torch.zeros(len(chunks), width, dtype=torch.int32)
        singles: list[tuple[int, int, int, int]] = []
        longer: list[tuple[int, int, int, int]] = []
        longest = 0
        for i, (row, length, first, own) in enumerate(chunks):
            mine = torch.tensor(list(own), dtype=torch.int64)
            pages[i, : len(own)] = mine
            at = torch.arange(first, first + length)
            slots[row : row + length] = mine[at // KEYS] * KEYS + at % KEYS
            longest = max(longest, first + length)
            (singles if length == 1 else longer).append((row, length, first, i))
        return cls(
            slots.to(device, non_blocking=True),
            pages.to(device, non_blocking=True),
            table(singles, device) if singles else None,
            longer,
            longest,
        )

    def tiles(self, group: int) -> Tensor | None:
        """The longer chunks, and under --deterministic all, cut for our kernel."""
        pack = pack_of(group)
        if pack not in self._tiles and self._longer:
            step = ROWS // pack
            cut = [
                (row + at, min(step, length - at), first + at, i)
                for row, length, first, i in self._longer
                for at in range((length - 1) // step * step, -1, -step)
            ]
            self._tiles[pack] = table(cut, self.slots.device)
        return self._tiles.get(pack)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Write the rows' keys and values into their pages, then attend over those.

        q, k, v as in SpanAttention; keys: [pages, KEYS, Hkv, Dk], values alike. Returns [rows, Hq, Dv], zeros
        outside of the chunks.
        """
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        sinks = None if sinks is None else sinks.detach().float().contiguous()
        write(k, v, keys, values, self.slots)
        out = q.new_zeros(q.shape[1], q.shape[0], v.shape[-1])
        tiles = self.tiles(q.shape[0] // k.shape[0])
        if tiles is not None:
            paged_forward(q, keys, values, tiles, self.pages, out, scale, window, sinks)
        if self.singles is not None:
            if gpu.CHOICE.deterministic:
                paged_forward(q, keys, values, self.singles, self.pages, out, scale, window, sinks)
            else:
                programs = len(self.singles) * k.shape[0]
                splits = min(_fill(q.device) // programs, -(-self._longest // _PART))
                decode(q, keys, values, self.singles, self.pages, out, scale, window, sinks, max(1, splits))
        return out


@functools.cache
def _fill(device: torch.device) -> int:
    """How many programs keep the whole device busy."""
    if device.type != "cuda":
        return 8
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count
