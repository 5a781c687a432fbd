"""What the replaced parts of a model need to know about the rows that are going through it.

All tokens of a pass stand in one packed row dimension, [1, rows]. Rows are grouped in segments, one
per adapter (or the base model), and a training segment in blocks, each a piece of one request that
was cut by that request alone. Segments and blocks start and end on multiples of PADDING.rows, because that
is what makes a matrix product's rows independent of their number (see exactness.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tinsmith.engine.kernels import attention as kernel
from tinsmith.engine.kernels import gpu
from tinsmith.engine.model.attention import PAGE, PackedAttention, round_up

if TYPE_CHECKING:  # lora imports this module
    from tinsmith.engine.model.lora import AdapterWeights, Gradients


@dataclass(slots=True)
class Block:
    """Rows [start, stop) of one request, whose LoRA gradients go to `gradients`."""

    start: int
    stop: int
    gradients: Gradients


@dataclass(slots=True)
class Segment:
    """Rows [start, stop) that meet one adapter, or none; `blocks` tile it when gradients are wanted."""

    start: int
    stop: int
    weights: AdapterWeights | None
    blocks: list[Block] = field(default_factory=list)


def units(segment: Segment) -> list[tuple[int, int, Gradients | None]]:
    """(start, stop, gradients) of what is computed by itself: a training block, or a whole segment."""
    if segment.blocks:
        return [(b.start, b.stop, b.gradients) for b in segment.blocks]
    return [(segment.start, segment.stop, None)]


class AttentionBackend(Protocol):
    """Attention of one layer over a pass's rows."""

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """q: [Hq, rows, Dk], k: [Hkv, rows, Dk], v: [Hkv, rows, Dv], the model's dtype -> [rows, Hq, Dv]."""


class RecurrentBackend(Protocol):
    """A layer with a state of its own (linear attention, Mamba), over a pass's rows."""

    def __call__(self, layer: int, mixer: Mixer, hidden: Tensor) -> Tensor:
        """hidden: [rows, H] -> [rows, H], each sequence by itself."""


Mixer = Callable[[Tensor, Any], Tensor]  # ([B, L, H], transformers' cache or None) -> [B, L, H]


@dataclass(slots=True)
class Places:
    """How the rows of a pass stand in a batch [B, L] of whole sequences."""

    of_rows: Tensor  # int64 [rows]: the flat place of each row; padding rows repeat any place
    of_batch: Tensor  # int64 [B * L]: the row of each place; padding places repeat a row of their sequence


@dataclass(slots=True)
class Pass:
    """One trip of packed rows through the model. While a recurrent layer works on a batch of sequences,
    the pass is one over their rows alone, and `places` says where they are.

    Adapters are no inputs of autograd, and nothing before the first of them needs a gradient: where a
    layer's input has none, `anchor` is what makes the backward pass come by.
    """

    segments: Sequence[Segment]
    attention: AttentionBackend | None = None
    recurrent: RecurrentBackend | None = None
    places: Places | None = None
    anchor: Tensor | None = None
    long: Tensor | None = None  # bool [rows]: whose sequence is a long one, see rotations.py; None: none is
    recomputes: bool = False  # whether layers are computed again in the backward pass: see recomputing.py
    pause: Callable[[], None] | None = None  # called at every layer with adapters, in both directions
    adapters: Any = None  # the segments as the kernels of a GPU want them: see kernels/gpu_lora.py
    plans: dict[tuple[int, ...], Any] = field(default_factory=dict)  # lora.py's, of some of the segments

    def anchor_of(self, slots: Iterable[str]) -> Tensor | None:
        """The anchor, for a layer one of whose slots has an adapter in this pass."""
        if self.anchor is None:
            return None
        names = list(slots)
        trained = any(s.weights is not None and any(map(s.weights.has, names)) for s in self.segments)
        return self.anchor if trained else None


_current: ContextVar[Pass | None] = ContextVar("tinsmith_pass", default=None)


def current_pass() -> Pass | None:
    """The pass whose rows are going through the model now."""
    return _current.get()


@contextmanager
def running(this: Pass) -> Iterator[None]:
    """Make `this` the current pass. The backward pass must run inside, too."""
    token = _current.set(this)
    try:
        yield
    finally:
        _current.reset(token)


class PackedSequences:
    """The training backend: block-diagonal causal attention over whole sequences.

    By the kernel where there is one. Else sequences of one padded length go together; a sequence's
    padded length is its own, so its result does not depend on its company.
    """

    def __init__(
        self, spans: Sequence[tuple[int, int]], rows: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """spans: (first row, length) of every sequence."""
        self.rows = rows
        self.on_gpu = None
        if gpu.takes(device, dtype):
            self.on_gpu = gpu.module("gpu_attention").Spans(spans, rows, device)
            return
        self.spans = kernel.Spans(spans) if kernel.usable(device, dtype) else None
        if self.spans is not None:
            return
        groups: dict[int, list[tuple[int, int]]] = {}
        for start, length in spans:
            groups.setdefault(round_up(length, PAGE), []).append((start, length))
        self.groups: list[tuple[int, int, Tensor, Tensor, Tensor]] = []
        for padded, members in sorted(groups.items()):
            offsets = torch.arange(padded)
            starts = torch.tensor([s for s, _ in members])[:, None]
            lengths = torch.tensor([n for _, n in members])[:, None]
            real = offsets < lengths
            # Padding reads the sequence's own first row: it stands behind every real query, unseen.
            index = torch.where(real, starts + offsets, starts).flatten()
            keep = real.flatten().nonzero().squeeze(1)
            to = index[keep]
            self.groups.append((len(members), padded, index.to(device), keep.to(device), to.to(device)))

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        result: Tensor
        if self.on_gpu is not None:
            attention = gpu.module("gpu_attention").SpanAttention
            result = attention.apply(q, k, v, self.on_gpu, scale, window, sinks)
            return result
        if self.spans is not None:
            result = kernel.SpanAttention.apply(q, k, v, self.spans, scale, window, sinks)
            return result
        out = q.new_zeros(self.rows, q.shape[0], v.shape[-1])
        for count, padded, index, keep, to in self.groups:
            qg, kg, vg = (
                x.index_select(1, index).unflatten(1, (count, padded)).transpose(0, 1) for x in (q, k, v)
            )
            o = PackedAttention.apply(qg, kg, vg, scale, window, sinks)  # [n, Hq, L, Dv]
            out = out.index_copy(0, to, o.transpose(1, 2).flatten(0, 1).index_select(0, keep))
        return out
