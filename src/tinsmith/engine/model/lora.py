"""Multi-adapter LoRA: which matrices an adapter has, its weights, and the linear layer that applies them.

y = W x + (alpha / rank) * B (A x), for every adapter on its own rows. The base weights are frozen and
shared. A and B are no inputs of autograd: the backward pass adds dA and dB, in fp32, to the
gradients of the block's own request, block after block, so that neither batching nor other tenants
change a bit of them.

Experts (3-D weights) share the factor on the hidden side among the experts of a layer, the other
factor is per expert, as in Tinker's own adapter format.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.engine.commands import LoraSpec
from tinsmith.engine.kernels import linear
from tinsmith.engine.kernels import lora as kernel
from tinsmith.engine.model.attention import pad_rows
from tinsmith.engine.model.packing import Pass, Segment, current_pass

Group = Literal["attn", "mlp", "unembed"]
PACKED_ROWS = 128  # rows of a pass up to which the packed weights are taken


@dataclass(frozen=True, slots=True)
class Slot:
    """One matrix that can have an adapter. `experts` is 0 for a plain linear layer.

    A is [r, in], B is [out, r]; with experts, the factor that is not `shared` has the expert as its
    first dimension.
    """

    name: str
    group: Group
    in_features: int
    out_features: int
    experts: int = 0
    shared: Literal["A", "B", ""] = ""

    def shape_a(self, rank: int) -> tuple[int, ...]:
        per_expert = (self.experts,) if self.experts and self.shared != "A" else ()
        return (*per_expert, rank, self.in_features)

    def shape_b(self, rank: int) -> tuple[int, ...]:
        per_expert = (self.experts,) if self.experts and self.shared != "B" else ()
        return (*per_expert, self.out_features, rank)


class Layout:
    """Where an adapter's matrices lie in its flat fp32 buffer: A and B of every slot, one after the other."""

    def __init__(self, slots: list[Slot], spec: LoraSpec) -> None:
        wanted = {"attn": spec.train_attn, "mlp": spec.train_mlp, "unembed": spec.train_unembed}
        self.spec = spec
        self.slots = [s for s in slots if wanted[s.group]]
        if not self.slots:
            raise ValueError(
                "none of train_attn, train_mlp and train_unembed selects a layer of this model; set at "
                "least one"
            )
        self.ranges: dict[str, tuple[int, tuple[int, ...], int, tuple[int, ...]]] = {}
        at = 0
        for slot in self.slots:
            a, b = slot.shape_a(spec.rank), slot.shape_b(spec.rank)
            size_a, size_b = _numel(a), _numel(b)
            self.ranges[slot.name] = (at, a, at + size_a, b)
            at += size_a + size_b
        self.size = at

    def views(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """(A, B) of every slot as views of `flat`."""
        return {
            name: (flat[a : a + _numel(sa)].view(sa), flat[b : b + _numel(sb)].view(sb))
            for name, (a, sa, b, sb) in self.ranges.items()
        }

    def initialize(self) -> Tensor:
        """Fresh weights: A uniform in +-1/sqrt(in) as PEFT's default, B zero.

        Each slot draws from its own generator, so that a matrix depends on the seed and its name
        alone and not on which other matrices are trained.
        """
        flat = torch.zeros(self.size, dtype=torch.float32)
        for slot in self.slots:
            digest = hashlib.sha256(f"{self.spec.seed}:{slot.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            a, _ = self.views(flat)[slot.name]
            bound = slot.in_features**-0.5
            a.uniform_(-bound, bound, generator=generator)
        return flat


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for x in shape:
        n *= x
    return n


class AdapterWeights:
    """An adapter's weights as the model computes with them: the base's dtype, the rank padded to a
    multiple of PADDING.rows with zeros (a product with few columns takes kernels that are not row-invariant),
    alpha / rank folded into B. Immutable: an optimizer step makes new ones.
    """

    __slots__ = ("__weakref__", "_a", "_b", "_packed", "_tables", "nbytes", "serial")
    _serials = itertools.count(1)

    def __init__(self, layout: Layout, flat: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        scale, rank = layout.spec.alpha / layout.spec.rank, layout.spec.rank
        padding = pad_rows(rank) - rank
        a = {n: F.pad(x, (0, 0, 0, padding)).to(device, dtype) for n, (x, _) in layout.views(flat).items()}
        b = {n: F.pad(x * scale, (0, padding)).to(device, dtype) for n, (_, x) in layout.views(flat).items()}
        self._fill(a, b)

    def _fill(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
        self._a, self._b = a, b
        self._packed: dict[tuple[str, bool], kernel.Packed | None] = {}
        self._tables: dict[tuple[str, ...], npt.NDArray[np.int64]] = {}
        self.nbytes = sum(x.numel() * x.element_size() for x in (*a.values(), *b.values()))
        self.serial = next(AdapterWeights._serials)  # identity that is never used again, unlike id()

    def tensors(self) -> dict[str, Tensor]:
        """Everything, for a file; `restore` reads it."""
        named = {f"{n}.A": x for n, x in self._a.items()} | {f"{n}.B": x for n, x in self._b.items()}
        return {n: x.cpu().contiguous() for n, x in named.items()}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], device: torch.device) -> AdapterWeights:
        """The weights that `tensors` was made from, bit for bit."""
        weights = cls.__new__(cls)
        weights._fill(
            {n[:-2]: x.to(device) for n, x in tensors.items() if n.endswith(".A")},
            {n[:-2]: x.to(device) for n, x in tensors.items() if n.endswith(".B")},
        )
        return weights

    def get(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(A, scaled B) of a slot, or None where it is not trained."""
        a = self._a.get(name)
        return None if a is None else (a, self._b[name])

    def packed(self, name: str, *, backward: bool) -> kernel.Packed | None:
        """A slot's matrices as the kernel wants them, made on first use; None if they do not suit it."""
        key = name, backward
        if key not in self._packed:
            a, b = self._a[name], self._b[name]
            made = None
            if kernel.packable(a, b):
                made = (kernel.pack_backward if backward else kernel.pack_forward)(a, b)
                self.nbytes += made.nbytes
            self._packed[key] = made
        return self._packed[key]

    def table(self, names: tuple[str, ...]) -> npt.NDArray[np.int64]:
        """What linear.cpp wants to know of these slots: [names, 3], the addresses of both packed matrices and
        the padded rank; zeros where a slot is not trained. All matrices must suit it (`packable`)."""
        found = self._tables.get(names)
        if found is None:
            found = np.zeros((len(names), 3), np.int64)
            for i, name in enumerate(names):
                packed = self.packed(name, backward=False) if name in self._a else None
                if packed is not None:
                    found[i] = packed.first.data_ptr(), packed.second.data_ptr(), len(self._a[name])
            self._tables[names] = found
        return found


class Gradients:
    """fp32 gradients of one request (or one run): a flat buffer beside the adapter's."""

    __slots__ = ("flat", "rank", "scale", "views")

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.flat = torch.zeros(layout.size, dtype=torch.float32, device=device)
        self.views = layout.views(self.flat)
        self.rank = layout.spec.rank
        self.scale = layout.spec.alpha / layout.spec.rank

    def add(self, name: str, expert: int | None, x: Tensor, h: Tensor, dy: Tensor, dh: Tensor) -> None:
        """Add one block's dA = dh^T x and dB = scale dy^T h.

        x: [n, in], h = A x: [n, padded r], dy: [n, out], dh = dy (scaled B): [n, padded r].
        """
        a, b = self.views[name]
        if expert is not None:
            a = a[expert] if a.dim() == 3 else a
            b = b[expert] if b.dim() == 3 else b
        a.addmm_(dh[:, : self.rank].float().T, x.float())
        b.addmm_(dy.float().T, h[:, : self.rank].float(), alpha=self.scale)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, parts: Parts, segments: Sequence[Segment]
) -> tuple[Tensor, list[Tensor | None]]:
    """The output, and A x of every segment and part, None where there is no adapter."""
    y = F.linear(x, weight, bias)
    hidden: list[Tensor | None] = []
    chains: list[kernel.Chain] = []
    by_kernel = kernel.usable(x)
    for segment in segments:
        rows = x[segment.start : segment.stop]
        for name, columns in parts:
            weights = segment.weights
            ab = weights.get(name) if weights is not None else None
            if weights is None or ab is None:
                hidden.append(None)
                continue
            out = y[segment.start : segment.stop, columns]
            packed = weights.packed(name, backward=False) if by_kernel else None
            if packed is None:
                h = F.linear(rows, ab[0])
                out += F.linear(h, ab[1])
            else:
                h = x.new_empty(len(rows), len(ab[0]))
                chains.append(kernel.Chain(rows, packed, h, out))
            hidden.append(h)
    if chains:
        kernel.run(chains)
    return y, hidden


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Parts, this: Pass) -> Tensor:
        y, hidden = _forward(x, weight, bias, parts, this.segments)
        ctx.save_for_backward(x, weight, *[h for h in hidden if h is not None])
        ctx.has, ctx.parts, ctx.this = [h is not None for h in hidden], parts, this
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight, *saved = ctx.saved_tensors
        rest = iter(saved)
        hidden = [next(rest) if has else None for has in ctx.has]
        dx = dy @ weight
        by_kernel = kernel.usable(x)
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        for part, (name, columns) in enumerate(ctx.parts):
            chains: list[kernel.Chain] = []
            outers: list[kernel.Outer] = []
            for segment, h in zip(ctx.this.segments, hidden[part :: len(ctx.parts)], strict=True):
                if h is None:
                    continue
                rows = slice(segment.start, segment.stop)
                packed = segment.weights.packed(name, backward=True) if by_kernel else None
                if packed is None:
                    _plain_backward(x, dy[rows, columns].contiguous(), dx[rows], h, segment, name)
                    continue
                dh = torch.empty_like(h)
                chains.append(kernel.Chain(dy[rows, columns], packed, dh, dx[rows]))
                for block in segment.blocks:
                    inner = slice(block.start - segment.start, block.stop - segment.start)
                    outer = slice(block.start, block.stop)
                    a, b = block.gradients.views[name]
                    scale = block.gradients.scale
                    outers.append(
                        kernel.Outer(x[outer], dh[inner], dy[outer, columns], h[inner], a, b, scale)
                    )
            if chains:
                kernel.run(chains)
            if outers:
                kernel.add_gradients(outers)
        return dx, None, None, None, None


def _plain_backward(x: Tensor, dy: Tensor, dx: Tensor, h: Tensor, segment: Segment, name: str) -> None:
    """One adapter's part of the backward pass by torch; dy, dx and h are the segment's rows alone."""
    a, b = segment.weights.get(name)  # type: ignore[union-attr, misc]
    dh = dy @ b
    dx += dh @ a
    for block in segment.blocks:
        inner = slice(block.start - segment.start, block.stop - segment.start)
        block.gradients.add(name, None, x[block.start : block.stop], h[inner], dy[inner], dh[inner])


Parts = Sequence[tuple[str, slice]]  # (slot name, columns of the output) of what a layer fuses


@dataclass(frozen=True, slots=True)
class Packed:
    """A layer's weight for passes without gradients, part by part, and the slot of each ("" for none)."""

    names: tuple[str, ...]
    matrices: list[linear.Matrix]

    def where(self, segments: Sequence[Segment], rows: int) -> linear.Segments:
        return linear.segments(
            [
                (s.start, min(s.stop, rows), s.weights.table(self.names))
                for s in segments
                if s.weights is not None
            ]
        )


class LoraLinear(nn.Module):
    """A frozen linear layer that applies each row's own adapters: one slot, or one for every part of the
    output, in order, where the model fuses several projections."""

    def __init__(self, base: nn.Linear, slots: Sequence[Slot]) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self.slots = list(slots)
        self.parts: list[tuple[str, slice]] = []
        at = 0
        for slot in slots:
            self.parts.append((slot.name, slice(at, at + slot.out_features)))
            at += slot.out_features
        self.packed: Packed | None = None

    def pack(self, depth: int) -> None:
        """Keep a copy of the weight that makes passes without gradients faster; see linear.find_depth."""
        cuts = [(name, columns.start, columns.stop) for name, columns in self.parts]
        if not cuts or cuts[-1][2] < self.out_features:  # what is behind the parts has no adapter
            cuts.append(("", cuts[-1][2] if cuts else 0, self.out_features))
        matrices = [
            linear.pack(self.weight[a:b], None if self.bias is None else self.bias[a:b], depth)
            for _, a, b in cuts
        ]
        self.packed = Packed(tuple(name for name, _, _ in cuts), matrices)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., rows, in] of the current pass's rows -> [..., rows, out]."""
        this = current_pass()
        if this is None:
            return F.linear(x, self.weight, self.bias)
        flat = x.reshape(-1, self.in_features)
        if this.places is not None:
            flat = flat.index_select(0, this.places.of_rows)
        y: Tensor
        if torch.is_grad_enabled():
            y = _LoraLinear.apply(flat, self.weight, self.bias, self.parts, this)
        elif self.packed is not None and len(flat) <= PACKED_ROWS:
            y = linear.run(flat, self.packed.matrices, self.packed.where(this.segments, len(flat)))
        else:
            y, _ = _forward(flat, self.weight, self.bias, self.parts, this.segments)
        if this.places is not None:
            y = y.index_select(0, this.places.of_batch)
        return y.view(*x.shape[:-1], self.out_features)


class GateLinear(nn.Module):
    """A frozen linear layer with a single output: [..., in] -> [..., 1].

    A product with one column takes a kernel whose rows depend on their number; this one has sixteen.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.pad(base.weight, (0, 0, 0, 15)), requires_grad=False)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)[..., :1]
        return y if self.bias is None else y + self.bias
