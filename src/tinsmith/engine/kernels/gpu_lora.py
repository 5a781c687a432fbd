"""Linear layers with the adapters of many tenants on a GPU: one launch for all of a pass's adapters.

What the kernels of triton_lora.py want to know of a pass (which rows meet which adapter, where its matrices
lie, where gradients go) is put together once a pass, in a few copies to the device, and read by every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.engine.kernels import gpu
from tinsmith.engine.kernels.triton_common import table
from tinsmith.engine.kernels.triton_lora import expand, outer, shrink
from tinsmith.engine.model.packing import Pass, Segment

if TYPE_CHECKING:  # lora imports this module when it is used
    from tinsmith.engine.model.lora import Slot

ROWS = 64  # of a tile
Parts = Sequence[tuple[str, slice]]


class Targets:
    """Where gradients go: for each request of a pass, its blocks of rows in order, its rank and its scale.

    `jobs` and `blocks` as triton_lora.outer takes them, a job for each request.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self._gradients: dict[int, Any] = {}
        spans: dict[int, list[tuple[int, int]]] = {}
        for block in (b for s in segments if s.weights is not None for b in s.blocks):
            self._gradients[id(block.gradients)] = block.gradients
            spans.setdefault(id(block.gradients), []).append((block.start, block.stop))
        jobs: list[tuple[int, ...]] = []
        blocks: list[tuple[int, int]] = []
        for i, own in enumerate(spans.values()):
            jobs.append((len(blocks), len(own), 1, i))
            blocks += own
        self.empty = not jobs
        if self.empty:
            return
        self.all = list(self._gradients.values())
        self.jobs, self.blocks = table(jobs, device), table(blocks, device)
        self.ranks = table([[g.rank for g in self.all]], device)[0]
        self.scales = _send(np.array([g.scale for g in self.all], np.float32), device)
        self.ones = torch.ones_like(self.scales)
        self.widest = max(g.rank for g in self.all)
        self._index, addresses = _side_by_side([(list(g.layout.ranges), _of_gradients(g)) for g in self.all])
        self._addresses = _send(addresses, device)

    def of(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The addresses of a slot's dA and dB, int64 by job; None where nobody trains it."""
        i = None if self.empty else self._index.get(name)
        return None if i is None else (self._addresses[0, i], self._addresses[1, i])


class Adapters:
    """The adapters of a pass, numbered, and which rows meet which: `tiles` as triton_lora takes them.

    width: the widest padded rank; rows: of a tile at most; parts: into how many a sum over a layer's inputs
    is divided; ranks: padded, int32 by adapter.
    """

    parts = 1
    rows = ROWS

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self._segments, self._device = segments, device
        self.weights: list[Any] = []
        numbers: dict[int, int] = {}
        tiles: list[tuple[int, int, int]] = []
        for segment in segments:
            weights = segment.weights
            if weights is None:
                continue
            if weights.serial not in numbers:
                numbers[weights.serial] = len(self.weights)
                self.weights.append(weights)
            number = numbers[weights.serial]
            tiles += [
                (at, min(ROWS, segment.stop - at), number) for at in range(segment.start, segment.stop, ROWS)
            ]
        self._targets: Targets | None = None
        self.units: Any = None  # see gpu_experts.py
        # The one adapter of all rows, whose products are ordinary ones.
        alone = len(segments) == 1 and len(self.weights) == 1 and not gpu.CHOICE.deterministic
        self.only = self.weights[0] if alone else None
        if not self.weights:
            return
        ranks = [w.rank for w in self.weights]
        self.width = max(ranks)
        # Behind the last adapter stands none.
        self.tiles, self.ranks = table(tiles, device), table([[*ranks, 0]], device)[0]
        self._index, addresses = addresses_of(self.weights)
        self._addresses = _send(addresses, device)

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The addresses of a slot's A and B, int64 by adapter; None where no adapter has it."""
        i = self._index.get(name) if self.weights else None
        return None if i is None else (self._addresses[0, i], self._addresses[1, i])

    def shapes(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Those of a slot's A and B, of any adapter that has them: the ranks differ."""
        a, b = next(w for w in self.weights if w.has(name)).get(name)
        return a.shape, b.shape

    @property
    def targets(self) -> Targets:
        if self._targets is None:
            self._targets = Targets(self._segments, self._device)
        return self._targets


class StaticAdapters(Adapters):
    """The adapters of decode steps of `most` rows, in buffers that stay where they are, so that a captured
    step serves whatever adapters `fill` puts there; none of them is wider than `width`."""

    def __init__(self, slots: Sequence[Slot], most: int, width: int, device: torch.device) -> None:
        self.weights, self.only, self.width = [], None, width
        self._slots = {slot.name: slot for slot in slots}
        self._index = {slot.name: i for i, slot in enumerate(slots)}
        if not gpu.CHOICE.deterministic:
            # A few rows are work for a few programs: the sum over a layer's inputs is divided among more.
            self.rows, self.parts = 16, max(1, min(8, 128 // most))

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.tiles, self.ranks = ints(most, 3), ints(most + 1)
        self._addresses = torch.zeros(2, len(slots), most + 1, dtype=torch.int64, device=device)
        self._most, self._device = most, device
        self.of_row = torch.zeros(most, dtype=torch.int64, device=device)  # which adapter each row has
        self._serials: list[int] | None = None
        self._spans: list[tuple[int, int, int]] | None = None
        self.units = None

    def fill(self, weights: Sequence[Any]) -> None:
        """The adapter of each row, or None; rows of one adapter stand together. What is there stays."""
        distinct = {w.serial: w for w in weights if w is not None}
        serials = list(distinct)
        if serials != self._serials:
            self._serials, self.weights = serials, list(distinct.values())  # kept as long as they are used
            addresses = np.zeros((2, len(self._index), self._most + 1), np.int64)
            ranks = np.zeros(self._most + 1, np.int32)
            if serials:
                index, found = addresses_of(self.weights)
                order = [self._index[name] for name in index]
                addresses[:, order, : len(serials)] = found[:, :, :-1]
                ranks[: len(serials)] = [w.rank for w in self.weights]
            self._addresses.copy_(torch.from_numpy(addresses))
            self.ranks.copy_(torch.from_numpy(ranks))
        numbers = {serial: i for i, serial in enumerate(serials)}
        spans: list[tuple[int, int, int]] = []
        of_row = [self._most] * self._most
        for row, w in enumerate(weights):
            if w is None:
                continue
            of_row[row] = numbers[w.serial]
            first, count, number = spans[-1] if spans else (0, 0, -1)
            if number == of_row[row] and first + count == row and count < self.rows:
                spans[-1] = (first, count + 1, number)
            else:
                spans.append((row, 1, of_row[row]))
        if spans != self._spans:
            self._spans = spans
            empty = [(0, 0, 0)] * (self._most - len(spans))
            self.tiles.copy_(torch.tensor([*spans, *empty], dtype=torch.int32))
            self.of_row.copy_(torch.tensor(of_row))

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        i = self._index.get(name) if self.width else None
        return None if i is None else (self._addresses[0, i], self._addresses[1, i])

    def shapes(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._slots[name].shape_a(1), self._slots[name].shape_b(1)


_OF_WEIGHTS: WeakKeyDictionary[Any, np.ndarray] = WeakKeyDictionary()
_OF_LAYOUTS: WeakKeyDictionary[Any, np.ndarray] = WeakKeyDictionary()


def addresses_of(weights: Sequence[Any]) -> tuple[dict[str, int], np.ndarray]:
    """Where A and B of each slot lie, int64 [2, slots, weights + 1], 0 where there is none, and which slot is
    which. The last column is of no adapter."""
    columns = []
    for w in weights:
        if w not in _OF_WEIGHTS:
            _OF_WEIGHTS[w] = np.array([[x.data_ptr() for x in w.get(n)] for n in w.names], np.int64).T
        columns.append((list(w.names), _OF_WEIGHTS[w]))
    index, found = _side_by_side(columns)
    return index, np.pad(found, ((0, 0), (0, 0), (0, 1)))


def _of_gradients(gradients: Any) -> np.ndarray:
    """Where dA and dB of each slot of the layout go, int64 [2, slots]."""
    layout = gradients.layout
    if layout not in _OF_LAYOUTS:
        _OF_LAYOUTS[layout] = np.array([(4 * a, 4 * b) for a, _, b, _ in layout.ranges.values()], np.int64).T
    return _OF_LAYOUTS[layout] + gradients.flat.data_ptr()


def _side_by_side(columns: Sequence[tuple[list[str], np.ndarray]]) -> tuple[dict[str, int], np.ndarray]:
    """(names, [2, names]) each -> one [2, all names, columns], zeros where a column lacks a name."""
    first = columns[0][0]
    if all(names == first for names, _ in columns):
        return {n: i for i, n in enumerate(first)}, np.stack([x for _, x in columns], 2)
    index = {n: i for i, n in enumerate(dict.fromkeys(n for names, _ in columns for n in names))}
    found = np.zeros((2, len(index), len(columns)), np.int64)
    for j, (names, x) in enumerate(columns):
        found[:, [index[n] for n in names], j] = x
    return index, found


def _send(array: np.ndarray, device: torch.device) -> Tensor:
    made = torch.from_numpy(array)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


def adapters_of(this: Pass, device: torch.device) -> Adapters:
    """A pass's adapters, made on first use."""
    if this.adapters is None:
        this.adapters = Adapters(this.segments, device)
    found: Adapters = this.adapters
    return found


class LoraLinear(torch.autograd.Function):
    """y = x W^T + b, and every row's own adapter on each part of the output."""

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
        """x: [rows, in] of the pass `this` -> [rows, out]. anchor: see Pass."""
        adapters = adapters_of(this, x.device)
        y = F.linear(x, weight, bias)
        hidden = [add(x, y[:, columns], name, adapters) for name, columns in parts]
        ctx.save_for_backward(x, weight, *[z for z in hidden if z is not None])
        ctx.names = [part for part, z in zip(parts, hidden, strict=True) if z is not None]
        ctx.adapters = adapters
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *hidden = ctx.saved_tensors
        dy = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        for (name, columns), z in zip(ctx.names, hidden, strict=True):
            take_back(x, dy[:, columns], dx, z, name, ctx.adapters)
        return dx, None, None, None, None, None


def add(x: Tensor, y: Tensor, name: str, adapters: Adapters) -> Tensor | None:
    """y [rows, out] += x A^T B^T of each row's adapter. Returns x A^T for `take_back`; None where no adapter
    has this slot."""
    factors = adapters.factors(name)
    if factors is None:
        return None
    if adapters.only is not None:
        a, b = adapters.only.get(name)
        z = F.linear(x, a)
        y.addmm_(z, b.T)
        return z
    z = shrink(
        x, adapters.tiles, factors[0], adapters.ranks, adapters.width, rank_first=True, rows=adapters.rows,
        parts=adapters.parts,
    )  # fmt: skip
    expand(z, y, adapters.tiles, factors[1], adapters.ranks, rank_first=False, rows=adapters.rows)
    return z


def take_back(x: Tensor, dy: Tensor, dx: Tensor | None, z: Tensor, name: str, adapters: Adapters) -> None:
    """The backward pass of `add`: dx += dy B A where it is wanted, and the gradients of A and B to their
    targets."""
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    factors = adapters.factors(name)
    assert factors is not None
    if adapters.only is not None:
        a, b = adapters.only.get(name)
        dz = dy @ b
        if dx is not None:
            dx.addmm_(dz, a)
    else:
        dz = shrink(
            dy, adapters.tiles, factors[1], adapters.ranks, adapters.width, rank_first=False,
            rows=adapters.rows,
        )  # fmt: skip
        if dx is not None:
            expand(dz, dx, adapters.tiles, factors[0], adapters.ranks, rank_first=True, rows=adapters.rows)
    targets = adapters.targets
    where = targets.of(name)
    if where is None:
        return
    same = {"jobs": targets.jobs, "blocks": targets.blocks, "ranks": targets.ranks, "width": targets.widest}
    outer(dz, x, targets=where[0], scales=targets.ones, rank_first=True, **same)
    outer(z, dy, targets=where[1], scales=targets.scales, rank_first=False, **same)
