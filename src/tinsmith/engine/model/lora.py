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
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.engine.commands import LoraSpec
from tinsmith.engine.kernels import gpu, linear
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
        self.plain = tuple(_packable(self.slots))  # what the CPU kernel takes: name, in, out
        starts = [(self.ranges[name][0], self.ranges[name][2]) for name, _, _ in self.plain]
        self.plain_starts = np.array(starts, np.int64).reshape(-1, 2)  # of their A and B, in the flat buffer

    def views(self, flat: Tensor, without: Container[str] = ()) -> dict[str, tuple[Tensor, Tensor]]:
        """(A, B) of every slot, but for those `without`, as views of `flat`."""
        return {
            name: (flat[a : a + _numel(sa)].view(sa), flat[b : b + _numel(sb)].view(sb))
            for name, (a, sa, b, sb) in self.ranges.items()
            if name not in without
        }

    def initialize(self) -> Tensor:
        """Fresh weights: A uniform in +-1/sqrt(in) as PEFT's default, B zero.

        Each slot draws from its own generator, so that a matrix depends on the seed and its name
        alone and not on which other matrices are trained.
        """
        flat = torch.zeros(self.size, dtype=torch.float32)
        views = self.views(flat)
        for slot in self.slots:
            digest = hashlib.sha256(f"{self.spec.seed}:{slot.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            a, _ = views[slot.name]
            bound = slot.in_features**-0.5
            a.uniform_(-bound, bound, generator=generator)
        return flat


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for x in shape:
        n *= x
    return n


def _packable(slots: Sequence[Slot]) -> list[tuple[str, int, int]]:
    return [
        (s.name, s.in_features, s.out_features)
        for s in slots
        if not s.experts and kernel.packable(s.in_features, s.out_features)
    ]


class AdapterWeights:
    """An adapter's weights as the model computes with them: the base's dtype, the rank padded to a
    multiple of PADDING.rows with zeros (a product with few columns takes kernels that are not row-invariant),
    alpha / rank folded into B. Immutable: an optimizer step makes new ones.

    Plain matrices are kept as the CPU kernel reads them, where it is used, and nowhere else.
    """

    __slots__ = ("__weakref__", "_a", "_b", "_packs", "_tables", "rank", "serial")
    _serials = itertools.count(1)

    def __init__(self, layout: Layout, flat: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        scale, rank = layout.spec.alpha / layout.spec.rank, layout.spec.rank
        padding = pad_rows(rank) - rank
        packs = None
        if layout.plain and kernel.usable(device, dtype):
            packs = kernel.Packs(layout.plain, rank + padding, backward=True)
            packs.fill_from(flat.data_ptr() + flat.element_size() * layout.plain_starts, rank, scale)
        rest = layout.views(flat, without=() if packs is None else packs.shapes)
        a = {n: F.pad(x, (0, 0, 0, padding)).to(device, dtype) for n, (x, _) in rest.items()}
        b = {n: F.pad(x * scale, (0, padding)).to(device, dtype) for n, (_, x) in rest.items()}
        self._fill(a, b, packs, rank + padding)

    def _fill(
        self, a: dict[str, Tensor], b: dict[str, Tensor], packs: kernel.Packs | None, rank: int
    ) -> None:
        self._a, self._b, self._packs, self.rank = a, b, packs, rank
        self._tables: dict[tuple[str, ...], linear.Table] = {}
        self.serial = next(AdapterWeights._serials)  # identity that is never used again, unlike id()

    @property
    def nbytes(self) -> int:
        own = sum(x.numel() * x.element_size() for x in (*self._a.values(), *self._b.values()))
        return own + (0 if self._packs is None else self._packs.nbytes)

    def tensors(self) -> dict[str, Tensor]:
        """Everything, for a file; `restore` reads it."""
        names = [*self._a, *(self._packs.shapes if self._packs is not None else ())]
        pairs = {n: self.get(n) for n in names}
        return {
            f"{n}.{part}": x.cpu().contiguous()
            for n, pair in pairs.items()
            if pair is not None
            for part, x in zip("AB", pair, strict=True)
        }

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], device: torch.device) -> AdapterWeights:
        """The weights that `tensors` was made from, bit for bit; for sampling."""
        weights = cls.__new__(cls)
        a = {n[:-2]: x.to(device) for n, x in tensors.items() if n.endswith(".A")}
        b = {n[:-2]: x.to(device) for n, x in tensors.items() if n.endswith(".B")}
        some = next(iter(a.values()))
        rank = some.shape[-2]
        packs = None
        if kernel.usable(device, some.dtype):
            plain = [
                (n, x.shape[1], b[n].shape[0])
                for n, x in a.items()
                if x.dim() == b[n].dim() == 2 and kernel.packable(x.shape[1], b[n].shape[0])
            ]
            if plain:
                packs = kernel.Packs(plain, rank, backward=False)
                packs.fill({n: (a.pop(n).float(), b.pop(n).float()) for n, _, _ in plain}, rank, 1.0)
        weights._fill(a, b, packs, rank)
        return weights

    def has(self, name: str) -> bool:
        """Whether a slot is trained."""
        return name in self._a or (self._packs is not None and name in self._packs.shapes)

    @property
    def names(self) -> Iterable[str]:
        """The slots whose matrices `get` gives without making them."""
        return self._a

    def get(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(A, scaled B) of a slot, or None where it is not trained."""
        if self._packs is not None and name in self._packs.shapes:
            return self._packs.matrices(name)
        a = self._a.get(name)
        return None if a is None else (a, self._b[name])

    def packed(self, name: str, *, backward: bool) -> kernel.Packed | None:
        """A slot's matrices as the kernel wants them; None where it does not serve them."""
        if self._packs is None or name not in self._packs.shapes:
            return None
        return self._packs.backward(name) if backward else self._packs.forward(name)

    def rest(self) -> None:
        """Give up what only training needs: the run has newer weights."""
        if self._packs is not None:
            self._packs.forget_backward()

    def table(self, names: tuple[str, ...]) -> linear.Table:
        """What linear.cpp wants to know of these slots: [names, 3], the addresses of both packed matrices and
        the padded rank; zeros where a slot is not trained. All matrices must suit it (`packable`)."""
        found = self._tables.get(names)
        if found is None:
            found = np.zeros((len(names), 3), np.int64)
            for i, name in enumerate(names):
                packed = self.packed(name, backward=False)
                if packed is not None:
                    found[i] = *packed, self.rank
            self._tables[names] = found
        return found


class Gradients:
    """fp32 gradients of one request (or one run): a flat buffer beside the adapter's."""

    __slots__ = ("flat", "layout", "rank", "scale")

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.flat = torch.zeros(layout.size, dtype=torch.float32, device=device)
        self.layout = layout
        self.rank = layout.spec.rank
        self.scale = layout.spec.alpha / layout.spec.rank

    def views(self, name: str) -> tuple[Tensor, Tensor]:
        """d A and d B of a slot."""
        a, of_a, b, of_b = self.layout.ranges[name]
        return self.flat[a : a + _numel(of_a)].view(of_a), self.flat[b : b + _numel(of_b)].view(of_b)

    def addresses(self, name: str) -> tuple[int, int]:
        """Where d A and d B of a slot lie."""
        a, _, b, _ = self.layout.ranges[name]
        base = self.flat.data_ptr()
        return base + 4 * a, base + 4 * b

    def add(self, name: str, expert: int | None, x: Tensor, h: Tensor, dy: Tensor, dh: Tensor) -> None:
        """Add one block's dA = dh^T x and dB = scale dy^T h.

        x: [n, in], h = A x: [n, padded r], dy: [n, out], dh = dy (scaled B): [n, padded r].
        """
        a, b = self.views(name)
        if expert is not None:
            a = a[expert] if a.dim() == 3 else a
            b = b[expert] if b.dim() == 3 else b
        a.addmm_(dh[:, : self.rank].float().T, x.float())
        b.addmm_(dy.float().T, h[:, : self.rank].float(), alpha=self.scale)


class _Adapted:
    """The segments of a pass that have an adapter at some slots, as the kernel wants to know them. Of `rows`
    rows: a pass may have fewer than its last segment would take."""

    def __init__(self, segments: Sequence[Segment], rows: int) -> None:
        self.weights = [s.weights for s in segments if s.weights is not None]
        self.blocks = [b for s in segments for b in s.blocks]
        self.plan = kernel.Plan(
            [(s.start, min(s.stop, rows), w.rank) for s, w in zip(segments, self.weights, strict=True)],
            [
                (i, b.start, b.stop, b.gradients.rank, b.gradients.scale)
                for i, s in enumerate(segments)
                for b in s.blocks
            ],
        )

    @classmethod
    def of(cls, this: Pass, name: str, rows: int) -> _Adapted | None:
        """Those with an adapter at slot `name`; None where there are none."""
        who = [i for i, s in enumerate(this.segments) if s.weights is not None and s.weights.has(name)]
        if not who:
            return None
        key = (rows, *who)
        if key not in this.plans:
            this.plans[key] = cls([this.segments[i] for i in who], rows)
        found: _Adapted = this.plans[key]
        return found

    def packed(self, name: str, *, backward: bool) -> list[kernel.Packed]:
        found = [w.packed(name, backward=backward) for w in self.weights]
        return [p for p in found if p is not None]


def _by_kernel(x: Tensor, columns: slice) -> bool:
    """Whether the kernel takes a part of the output: then it does so for every adapter."""
    return kernel.usable(x.device, x.dtype) and kernel.packable(x.shape[1], columns.stop - columns.start)


def by_torch(slot: Slot, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an adapter's products there are torch's."""
    by_kernel = kernel.usable(device, dtype) and kernel.packable(slot.in_features, slot.out_features)
    return bool(slot.experts) or not by_kernel


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, parts: Parts, this: Pass
) -> tuple[Tensor, list[Tensor | None]]:
    """The output, and A x: of every part, where the kernel takes it, else of every part and segment. None
    where there is no adapter."""
    y = F.linear(x, weight, bias)
    hidden: list[Tensor | None] = []
    for name, columns in parts:
        if _by_kernel(x, columns):
            adapted = _Adapted.of(this, name, len(x))
            packed = adapted.packed(name, backward=False) if adapted is not None else []
            hidden.append(None if adapted is None else adapted.plan.run(x, packed, y[:, columns]))
            continue
        for segment in this.segments:
            ab = segment.weights.get(name) if segment.weights is not None else None
            h = None
            if ab is not None:
                h = F.linear(x[segment.start : segment.stop], ab[0])
                y[segment.start : segment.stop, columns] += F.linear(h, ab[1])
            hidden.append(h)
    return y, hidden


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        parts: Parts,
        this: Pass,
    ) -> Tensor:
        x = x if x.stride(-1) == 1 else x.contiguous()
        y, hidden = _forward(x, weight, bias, parts, this)
        ctx.save_for_backward(x, weight, *[h for h in hidden if h is not None])
        ctx.has, ctx.parts, ctx.this = [h is not None for h in hidden], parts, this
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.this.pause is not None:
            ctx.this.pause()
        (dy,) = grads
        x, weight, *saved = ctx.saved_tensors
        rest, has = iter(saved), iter(ctx.has)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        for name, columns in ctx.parts:
            if _by_kernel(x, columns):
                adapted = _Adapted.of(ctx.this, name, len(x)) if next(has) else None
                if adapted is not None:
                    part = dy[:, columns]
                    dz = adapted.plan.run(part, adapted.packed(name, backward=True), dx)
                    if adapted.blocks:
                        to = [b.gradients.addresses(name) for b in adapted.blocks]
                        adapted.plan.add_gradients(x, dz, part, next(rest), to)
                continue
            for segment in ctx.this.segments:
                if next(has):
                    rows = slice(segment.start, segment.stop)
                    into = None if dx is None else dx[rows]
                    _plain_backward(x, dy[rows, columns].contiguous(), into, next(rest), segment, name)
        return dx, None, None, None, None, None


def _plain_backward(x: Tensor, dy: Tensor, dx: Tensor | None, h: Tensor, segment: Segment, name: str) -> None:
    """One adapter's part of the backward pass by torch; dy, dx and h are the segment's rows alone."""
    a, b = segment.weights.get(name)  # type: ignore[union-attr, misc]
    dh = dy @ b
    if dx is not None:
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
        if this.pause is not None:
            this.pause()
        flat = x.reshape(-1, self.in_features)
        if this.places is not None:
            flat = flat.index_select(0, this.places.of_rows)
        y: Tensor
        anchor = None if flat.requires_grad else this.anchor_of(name for name, _ in self.parts)
        if gpu.takes(flat.device, flat.dtype):
            on_gpu = gpu.module("gpu_lora").LoraLinear
            y = on_gpu.apply(flat, anchor, self.weight, self.bias, self.parts, this)
        elif torch.is_grad_enabled() and (flat.requires_grad or anchor is not None):
            y = _LoraLinear.apply(flat, anchor, self.weight, self.bias, self.parts, this)
        elif self.packed is not None and len(flat) <= PACKED_ROWS:
            y = linear.run(flat, self.packed.matrices, self.packed.where(this.segments, len(flat)))
        else:
            y, _ = _forward(flat, self.weight, self.bias, self.parts, this)
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
