"""Attention by the CPU kernel (attention.cpp): over packed sequences in training, over pages in sampling."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.kernels.library import library, pointer

VALUE_PAD = 16  # a page's values stand in rows of a multiple of this, as attention.cpp has it
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels serve tensors of this kind here."""
    return device.type == "cpu" and dtype in _NAMES and library() is not None


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    function = getattr(library(), f"{name}_{_NAMES[dtype]}")
    function(*arguments)


def _strides(*tensors: Tensor) -> Any:
    """(head, row) strides of [heads, rows, dim] tensors, in elements."""
    values = [stride for x in tensors for stride in (x.stride(0), x.stride(1))]
    return (ctypes.c_int64 * len(values))(*values)


def _dense(x: Tensor) -> Tensor:
    """The kernels step through heads and rows as they lie; a row's elements must lie together."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _ints(values: Sequence[int]) -> Any:
    return (ctypes.c_int * len(values))(*values)


class Spans:
    """Where whole sequences lie in packed rows: (first row, length) of each."""

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        self.count = len(spans)
        self.numbers = _ints([n for span in spans for n in span])


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
        """q: [Hq, rows, Dk], k: [Hkv, rows, Dk], v: [Hkv, rows, Dv] -> [rows, Hq, Dv], zeros outside of the
        spans. sinks: [Hq] extra logits that take part in the normalization alone."""
        q, k, v = _dense(q), _dense(k), _dense(v)
        heads, rows, dim = q.shape
        out = q.new_zeros(rows, heads, v.shape[-1])
        top, total = (torch.empty(heads, rows, dtype=torch.float32) for _ in range(2))
        sinks = None if sinks is None else sinks.detach().float().contiguous()
        _call(
            "train_forward", q.dtype,
            pointer(q), pointer(k), pointer(v), pointer(out), pointer(top), pointer(total),
            spans.numbers, spans.count, _strides(q, k, v), heads, k.shape[0], dim, v.shape[-1], rows,
            ctypes.c_float(scale), window or 0, pointer(sinks), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, top, total)
        ctx.spans, ctx.scale, ctx.window = spans, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, top, total = ctx.saved_tensors
        grad = _dense(grads[0].transpose(0, 1))
        dq, dk, dv = (x.new_zeros(x.shape[1], x.shape[0], x.shape[2]) for x in (q, k, v))
        _call(
            "train_backward", q.dtype,
            pointer(q), pointer(k), pointer(v), pointer(out), pointer(grad), pointer(top),
            pointer(total), pointer(dq), pointer(dk), pointer(dv), ctx.spans.numbers, ctx.spans.count,
            _strides(q, k, v, grad), q.shape[0], k.shape[0], q.shape[2], v.shape[2], q.shape[1],
            ctypes.c_float(ctx.scale), ctx.window or 0, torch.get_num_threads(),
        )  # fmt: skip
        return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1), None, None, None, None


class Chunks:
    """New tokens of sequences and the pages of each: (first row, length, position, pages).

    numbers: int32 [chunks, 4], with where in `pages` (int32) a chunk's own begin in place of those.
    """

    def __init__(self, chunks: Sequence[tuple[int, int, int, Sequence[int]]], room: int = 0) -> None:
        """room: for how many more pages each has a place."""
        self.count = len(chunks)
        numbers: list[tuple[int, int, int, int]] = []
        pages: list[int] = []
        more = [0] * room
        for row, length, position, own in chunks:
            numbers.append((row, length, position, len(pages)))
            pages += own
            pages += more
        self.room = [len(own) + room for *_, own in chunks]
        self.numbers = np.array(numbers, np.int32).reshape(-1, 4)
        self.pages = np.array(pages, np.int32)
        self.pointers = self.numbers.ctypes.data, self.pages.ctypes.data


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    chunks: Chunks,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """Write the chunks' keys and values into their pages, then attend over those.

    q, k, v as in SpanAttention. key_pages: [pages, Hkv, Dk, PAGE], value_pages: [pages, Hkv, PAGE, Dv padded
    to VALUE_PAD]. Returns [rows, Hq, Dv], zeros outside of the chunks.
    """
    q, k, v = _dense(q), _dense(k), _dense(v)
    heads, rows, dim = q.shape
    out = q.new_zeros(rows, heads, v.shape[-1])
    sinks = None if sinks is None else sinks.detach().float().contiguous()
    numbers, pages = map(ctypes.c_void_p, chunks.pointers)
    _call(
        "paged", q.dtype,
        pointer(q), pointer(k), pointer(v), pointer(out), pointer(key_pages), pointer(value_pages),
        numbers, chunks.count, pages, _strides(q, k, v), heads, k.shape[0], dim, v.shape[-1],
        ctypes.c_float(scale), window or 0, pointer(sinks), torch.get_num_threads(),
    )  # fmt: skip
    return out
