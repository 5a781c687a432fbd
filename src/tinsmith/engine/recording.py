"""A model's way from embedded tokens to final hidden states, recorded from its own code as a list of steps.

The model is run once while torch's operations, the CPU kernels' calls and the attention are watched. Nothing
is known here of any family: what the kernels do becomes an instruction of program.cpp; every other operation
becomes a call that is made again as it was. Where something is done that cannot be repeated so (a number read
out of a tensor, a tensor written to in place), there is no recording, and the model's own code runs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tinsmith.engine.kernels import elementwise, linear
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.packing import PackedSequences, Pass, Segment, running

LINEAR, ATTENTION, NORM, GATE, ROTATE, ADD = range(6)  # as in program.cpp


class NotRepeatable(Exception):
    """The model does something that a recording cannot hold; the message says what."""


@dataclass(frozen=True, slots=True)
class Place:
    """Somewhere in a value: so many bytes behind its beginning."""

    value: int
    offset: int


@dataclass(frozen=True, slots=True)
class View:
    """A tensor on a value's memory."""

    value: int
    offset: int  # in elements
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """The pages of one layer's keys (or values)."""

    layer: int
    keys: bool


@dataclass(frozen=True, slots=True)
class Native:
    """An instruction: its operands are numbers, Places, Layers and tensors that stay where they are.

    A LINEAR has x, what is between its rows, the matrix and its slot; those of one x become one instruction.
    """

    kind: int
    operands: tuple[Any, ...]
    out: int  # the value that it writes
    nbytes: int  # of that


@dataclass(frozen=True, slots=True)
class Call:
    """function(*args, **kwargs), with Views in the place of tensors that differ from pass to pass."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    out: tuple[int, ...]


EMBEDDED, POSITIONS = 0, 1  # the values that are given


@dataclass(slots=True)
class Recording:
    """Steps in order; the result is a View [1, rows, hidden]."""

    steps: list[Native | Call] = field(default_factory=list)
    result: View | None = None


def record(model: BaseModel, rows: int, slots: dict[str, int]) -> Recording:
    """Run `rows` rows of one sequence through and watch. slots: the number of each adapter slot's name.
    Raises NotRepeatable."""
    recorder = _Recorder(model, rows, slots)
    with torch.no_grad():
        embedded = model.embed(torch.arange(rows) % model.vocab_size)
        positions = torch.arange(rows)
        recorder.own(embedded), recorder.own(positions)
        this = Pass([Segment(0, rows, None)], recorder.attend)
        with running(this), recorder.watching(), recorder:
            hidden = model.through(embedded, positions)
    recorder.made.result = recorder.view(hidden)
    return recorder.made


class _Recorder(TorchDispatchMode):
    def __init__(self, model: BaseModel, rows: int, slots: dict[str, int]) -> None:
        super().__init__()
        self.rows, self.slots, self.made = rows, slots, Recording()
        self._attention = PackedSequences([(0, rows)], rows, model.device, model.dtype)
        self._values: dict[int, int] = {}  # by where their memory begins
        self._kept: list[Tensor] = []  # so that no memory is used twice
        self._inside = False  # a kernel's call, whose own operations are none of the model's
        self._matrices = {id(m.packed.matrices): m.packed for m in model.linears() if m.packed is not None}

    # What tensors are

    def own(self, x: Tensor) -> int:
        """The number of a new value, which `x` is all of."""
        self._kept.append(x)
        self._values[x.untyped_storage().data_ptr()] = len(self._kept) - 1
        return len(self._kept) - 1

    def known(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self._values

    def place(self, x: Tensor) -> Place | Tensor:
        """A tensor as an operand; one that no step has made stays where it is."""
        if not self.known(x):
            return x
        return Place(self._values[x.untyped_storage().data_ptr()], int(x.storage_offset()) * x.element_size())

    def view(self, x: Tensor) -> View:
        value = self._values[x.untyped_storage().data_ptr()]
        if x.dtype is not self._kept[value].dtype:
            raise NotRepeatable("memory is read as another type than it was written as")
        return View(value, int(x.storage_offset()), tuple(x.shape), x.stride())

    # What is done

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        if func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
            raise NotRepeatable(f"{func} writes to what it is given, or draws numbers")
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        outs = [out] if isinstance(out, Tensor) else out
        if not (isinstance(outs, (list, tuple)) and all(isinstance(x, Tensor) for x in outs)):
            raise NotRepeatable(f"{func} makes a number out of a tensor")
        if not self._is_sum(func, args, kwargs, outs[0]):
            spec = self._spec((args, kwargs))
            self.made.steps.append(Call(func, spec[0], spec[1], tuple(self.own(x) for x in outs)))
        return out

    def _spec(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self.view(x) if self.known(x) else x
        if isinstance(x, (list, tuple)):
            return type(x)(self._spec(item) for item in x)
        return {k: self._spec(v) for k, v in x.items()} if isinstance(x, dict) else x

    def _is_sum(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> bool:
        """Whether it was a sum of rows, which there is an instruction for."""
        if func is not torch.ops.aten.add.Tensor or kwargs or len(args) != 2:
            return False
        x, y = args
        if not (isinstance(y, Tensor) and x.dtype is y.dtype is torch.bfloat16 and x.shape == y.shape):
            return False
        if not all(t.is_contiguous() for t in (x, y, out)) or x.dim() < 2 or x.shape[-2] != self.rows:
            return False
        self._native(ADD, out, self.place(x), self.place(y), None, x.numel() // self.rows)
        return True

    def _native(self, kind: int, out: Tensor, *operands: Any) -> None:
        """None among the operands stands for the output."""
        places = tuple(Place(len(self._kept), 0) if x is None else x for x in operands)
        self.made.steps.append(Native(kind, places, self.own(out), out.numel() * out.element_size()))

    @contextmanager
    def watching(self) -> Iterator[None]:
        with (
            mock.patch.object(elementwise, "norm", self._around(elementwise.norm, self._norm)),
            mock.patch.object(elementwise, "gate", self._around(elementwise.gate, self._gate)),
            mock.patch.object(elementwise, "rotate", self._around(elementwise.rotate, self._rotate)),
            mock.patch.object(linear, "run", self._around(linear.run, self._linear)),
        ):
            yield

    def _around(self, function: Callable[..., Tensor], seen: Callable[..., bool]) -> Callable[..., Tensor]:
        """The function, and an instruction for it; a call where there is none for what it is given."""

        def call(*args: Any) -> Tensor:
            self._inside = True
            try:
                out = function(*args)
                if not seen(out, *args):
                    self.made.steps.append(Call(function, self._spec(args), {}, (self.own(out),)))
            finally:
                self._inside = False
            return out

        return call

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """The pass's attention."""
        return self._around(self._attention, self._attend)(layer, q, k, v, scale, window, sinks)

    def _attend(
        self,
        out: Tensor,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        sinks: Tensor | None,
    ) -> bool:
        if any(x.stride(-1) != 1 for x in (q, k, v)):
            raise NotRepeatable("attention is given heads whose numbers lie apart")
        strides = [stride for x in (q, k, v) for stride in (x.stride(0), x.stride(1))]
        kept = 0 if sinks is None else sinks.detach().float().contiguous()
        self._native(
            ATTENTION, out, self.place(q), self.place(k), self.place(v), None,
            Layer(layer, keys=True), Layer(layer, keys=False), *strides, q.shape[0], k.shape[0], q.shape[-1],
            v.shape[-1], _bits(scale), window or 0, kept,
        )  # fmt: skip
        return True

    def _linear(self, out: Tensor, x: Tensor, matrices: Sequence[linear.Matrix], where: Any) -> bool:
        packed = self._matrices[id(matrices)]
        if x.stride(-1) != 1 or len(x) != self.rows:
            raise NotRepeatable("a product is given other rows than the pass's")
        value, at = self.own(out), 0
        for name, matrix in zip(packed.names, packed.matrices, strict=True):
            to = Place(value, at * out.element_size())
            operands = (self.place(x), x.stride(0), matrix, to, out.stride(0), self.slots[name])
            self.made.steps.append(Native(LINEAR, operands, value, out.numel() * out.element_size()))
            at += matrix.n
        return True

    def _norm(self, out: Tensor, x: Tensor, weight: Tensor, eps: float, style: int) -> bool:
        shape, strides = list(x.shape), list(x.stride())
        if shape[0] == 1 and x.dim() > 2:
            shape, strides = shape[1:], strides[1:]
        if shape[0] != self.rows or strides[-1] != 1 or len(shape) > 3:
            return False
        heads = shape[1] if len(shape) == 3 else 1
        inner = strides[1] if len(shape) == 3 else strides[0]
        self._native(
            NORM,
            out,
            self.place(x),
            weight,
            None,
            heads,
            shape[-1],
            inner,
            strides[0],
            _bits(eps),
            int(style),
        )
        return True

    def _gate(self, out: Tensor, x: Tensor, up: Tensor) -> bool:
        flat, other = (t.reshape(-1, t.shape[-1]) for t in (x, up))
        if len(flat) != self.rows or flat.stride(-1) != 1 or other.stride(-1) != 1:
            return False
        width = flat.shape[1]
        self._native(
            GATE, out, self.place(flat), self.place(other), None, width, flat.stride(0), other.stride(0)
        )
        return True

    def _rotate(self, out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, rotary: int) -> bool:
        _, heads, rows, dim = x.shape
        if rows != self.rows or x.stride(-1) != 1 or not (cos.is_contiguous() and sin.is_contiguous()):
            return False
        half, width = rotary // 2, cos.shape[-1]
        self._native(
            ROTATE, out, self.place(x), self.place(cos), self.place(sin), None, heads, dim, half,
            width - half, width, x.stride(1), x.stride(2),
        )  # fmt: skip
        return True


def _bits(x: float) -> int:
    """An fp32 number's bits."""
    return int(struct.unpack("<i", struct.pack("<f", x))[0])


# Recordings of different numbers of rows, as one that is good for any


@dataclass(frozen=True, slots=True)
class Line:
    """A number that grows with the rows."""

    start: int
    slope: int

    def at(self, rows: int) -> int:
        return self.start + self.slope * rows


def generalize(recordings: Sequence[Recording], rows: Sequence[int]) -> Recording:
    """What holds for any number of rows that is a multiple of the rows of the first one: Lines where the
    recordings differ. Raises NotRepeatable where they differ otherwise."""
    if len({len(r.steps) for r in recordings}) != 1:
        raise NotRepeatable("other steps for another number of rows")
    steps = [_merged(parts, rows) for parts in zip(*(r.steps for r in recordings), strict=True)]
    return Recording(steps, _merged([r.result for r in recordings], rows))


def _merged(parts: Sequence[Any], rows: Sequence[int]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor) or any(isinstance(x, Tensor) for x in parts):
        if all(x is first for x in parts):
            return first
        same = all(isinstance(x, Tensor) and x.shape == first.shape and torch.equal(x, first) for x in parts)
        if not same:
            raise NotRepeatable("a constant that depends on the rows")
        return first
    if any(type(x) is not type(first) for x in parts):
        raise NotRepeatable("other operations for another number of rows")
    if isinstance(first, (Place, View, Native, Call)):
        fields = type(first).__dataclass_fields__
        return type(first)(*(_merged([getattr(x, name) for x in parts], rows) for name in fields))
    if isinstance(first, (list, tuple)):
        if len({len(x) for x in parts}) != 1:
            raise NotRepeatable("other operands for another number of rows")
        return type(first)(_merged(items, rows) for items in zip(*parts, strict=True))
    if isinstance(first, dict):
        return {k: _merged([x[k] for x in parts], rows) for k in first}
    if all(x is first or x == first for x in parts):
        return first
    if not isinstance(first, int):
        raise NotRepeatable(f"{first!r} for one number of rows, {parts[1]!r} for another")
    slope = (parts[1] - parts[0]) // (rows[1] - rows[0])
    line = Line(parts[0] - slope * rows[0], slope)
    if any(line.at(n) != x for n, x in zip(rows, parts, strict=True)):
        raise NotRepeatable("a number that does not grow with the rows")
    return line


def at_rows(x: Any, rows: int) -> Any:
    """What a generalized recording's part is for so many rows."""
    if isinstance(x, Line):
        return x.at(rows)
    if isinstance(x, (Place, View, Native, Call)):
        return type(x)(*(at_rows(getattr(x, name), rows) for name in type(x).__dataclass_fields__))
    if isinstance(x, (list, tuple)):
        return type(x)(at_rows(item, rows) for item in x)
    return {k: at_rows(v, rows) for k, v in x.items()} if isinstance(x, dict) else x
