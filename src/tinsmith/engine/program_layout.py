"""How a recorded program is laid out for a number of rows.

Where every value lies in one piece of memory, which products go together, and the instructions as the numbers
that program.cpp reads.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.kernels.linear import Table
from tinsmith.engine.kv_cache import PagePool
from tinsmith.engine.position_tables import PositionTables, of_positions
from tinsmith.engine.recording import (
    ATTENTION,
    LINEAR,
    POSITIONS,
    Call,
    Layer,
    Native,
    Place,
    Recording,
    View,
    at_rows,
)

FIELDS, PRODUCT = 20, 10  # of an instruction, as in program.cpp, and of a product in linear.cpp
_ALIGNED = 64  # bytes

_Bound = Callable[[dict[int, Tensor]], Any]  # of the values of a run


class Layout:
    """A program for one number of rows: where its values lie, and its instructions as numbers."""

    def __init__(self, recording: Recording, rows: int) -> None:
        steps = _needed([at_rows(step, rows) for step in recording.steps], recording.result)
        self.steps = _together(steps)
        self.result: View = at_rows(recording.result, rows)
        offsets, size = _places(self.steps, self.result)
        self.arena = torch.empty(size // 2, dtype=torch.bfloat16)
        self.offsets = offsets
        linears = sum(isinstance(s, Native) and s.kind == LINEAR for s in self.steps)
        self.code = np.zeros((len(self.steps), FIELDS), np.int64)
        self.products = np.zeros((max(1, linears), PRODUCT), np.int64)
        self.parts: list[tuple[int, int] | Call] = []  # instructions [first, last), and calls between them
        self.of_positions, self.tabled = _of_positions(self.steps)
        self._looked_up: dict[int, Tensor] = {}  # where values that are looked up lie
        self.given: dict[int, list[tuple[Table, tuple[int, int], int]]] = {}  # operands that are set in a run
        self.pages: list[tuple[tuple[int, int], Layer]] = []
        self._bound: dict[int, tuple[_Bound, _Bound]] = {}  # by the id of a call
        self.pool_pages = -1  # which of a pool's pages the operands are
        self._fill()
        self.others = [p for p in self.parts[:-1] if not any(p is call for call in self.of_positions)]
        self.code_address: int = self.code.ctypes.data

    def _fill(self) -> None:
        row = product = 0
        previous: Place | None = None
        for step in self.steps:
            if isinstance(step, Call):
                self.parts.append(step)
                previous = None
                continue
            if not self.parts or isinstance(self.parts[-1], Call):
                self.parts.append((row, row))
            if step.kind == LINEAR:
                x, between, matrix, to, to_between, slot = step.operands
                fields = (x, between, matrix.k, matrix.n, matrix.depth, matrix.tiles)
                for i, operand in enumerate((*fields, matrix.bias or 0, to, to_between, slot)):
                    self._set(self.products, (product, i), operand)
                if x != previous:
                    address = self.products.ctypes.data + product * self.products.itemsize * PRODUCT
                    self.code[row, :3] = LINEAR, address, 0
                    row += 1
                self.code[row - 1, 2] += 1
                product += 1
                previous = x
            else:
                self.code[row, 0] = step.kind
                for i, operand in enumerate(step.operands):
                    self._set(self.code, (row, i + 1), operand)
                row += 1
                previous = None
            self.parts[-1] = (self.parts[-1][0], row)  # type: ignore[index]

    def _set(self, table: Table, index: tuple[int, int], operand: Any) -> None:
        if isinstance(operand, Place) and operand.value in self.offsets:
            table[index] = self.arena.data_ptr() + self.offsets[operand.value] + operand.offset
        elif isinstance(operand, Place):
            self.given.setdefault(operand.value, []).append((table, index, operand.offset))
        elif isinstance(operand, Layer):
            self.pages.append((index, operand))
        else:
            table[index] = operand.data_ptr() if isinstance(operand, Tensor) else operand

    def look_up(self, tables: PositionTables, positions: Tensor, values: dict[int, Tensor]) -> None:
        """Take what is of positions alone out of the tables."""
        for value in tables.values:
            out = self._looked_up.get(value)
            if out is None:
                with torch.inference_mode(False):
                    out = self._looked_up[value] = tables.empty(value, len(positions))
            tables.look_up(value, positions, out)
            values[value] = out
            self.give(value, out)

    def computed(self, positions: Tensor) -> dict[int, Tensor]:
        """What is of positions alone."""
        values = {POSITIONS: positions}
        for call in self.of_positions:
            keep(call, self.call(call, values), values)
        return {value: values[value] for value in self.tabled}

    def give(self, value: int, x: Tensor) -> None:
        """Say where a value is that lies outside of the arena."""
        for table, index, offset in self.given.get(value, ()):
            table[index] = x.data_ptr() + offset

    def set_pages(self, pool: PagePool) -> None:
        if self.pool_pages != pool.generation:
            for index, page in self.pages:
                store = pool.keys if page.keys else pool.values
                self.code[index] = store[page.layer].data_ptr()
            self.pool_pages = pool.generation

    def call(self, call: Call, values: dict[int, Tensor]) -> Any:
        """What a call gives. How its arguments come about is found out the first time."""
        bound = self._bound.get(id(call))
        if bound is None:
            bound = self._bound[id(call)] = self._bind(call.args, values), self._bind(call.kwargs, values)
        args, kwargs = bound
        return call.function(*args(values), **kwargs(values))

    def _bind(self, x: Any, values: dict[int, Tensor]) -> _Bound:
        """What gives `real(x, values)` of this and of any later run, whose values have the same shapes."""
        if isinstance(x, View) and x.value not in self.offsets:
            if self.real(x, values) is values[x.value]:
                return operator.itemgetter(x.value)
            return lambda given: self.real(x, given)
        if isinstance(x, (list, tuple)):
            kind, parts = type(x), [self._bind(item, values) for item in x]
            return lambda given: kind([part(given) for part in parts])
        if isinstance(x, dict):
            named = {k: self._bind(v, values) for k, v in x.items()}
            return lambda given: {k: part(given) for k, part in named.items()}
        made = self.real(x, values)  # a constant, or a place in the arena
        return lambda _: made

    def real(self, x: Any, values: dict[int, Tensor]) -> Any:
        """The tensors that Views stand for."""
        if isinstance(x, View) and x.value in self.offsets:
            return self.arena.as_strided(x.size, x.stride, self.offsets[x.value] // 2 + x.offset)
        if isinstance(x, View):
            base = values[x.value]
            if x.offset == 0 and tuple(base.shape) == x.size and base.stride() == x.stride:
                return base
            return base.as_strided(x.size, x.stride, x.offset)
        if isinstance(x, (list, tuple)):
            return type(x)(self.real(item, values) for item in x)
        return {k: self.real(v, values) for k, v in x.items()} if isinstance(x, dict) else x


def _reads(step: Native | Call) -> set[int]:
    """The values that a step needs."""
    found: set[int] = set()

    def look(x: Any) -> None:
        if isinstance(x, (Place, View)):
            found.add(x.value)
        elif isinstance(x, (list, tuple)):
            for item in x:
                look(item)
        elif isinstance(x, dict):
            look(list(x.values()))

    look(step.operands if isinstance(step, Native) else (step.args, step.kwargs))
    return found - _writes(step)


def _writes(step: Native | Call) -> set[int]:
    return {step.out} if isinstance(step, Native) else set(step.out)


def _of_positions(steps: Sequence[Native | Call]) -> tuple[list[Call], list[int]]:
    """The calls that need positions alone, and those of their values that others need."""
    own = of_positions([_reads(s) for s in steps], [_writes(s) for s in steps], POSITIONS)
    calls = [step for i in own if isinstance(step := steps[i], Call)]
    if len(calls) < len(own):
        return [], []
    needed = set().union(*(_reads(step) for i, step in enumerate(steps) if i not in own))
    return calls, sorted(needed & set().union(*(_writes(call) for call in calls)))


def keep(call: Call, made: Any, values: dict[int, Tensor]) -> None:
    for value, x in zip(call.out, [made] if isinstance(made, Tensor) else made, strict=True):
        values[value] = x


def _needed(steps: Sequence[Native | Call], result: View | None) -> list[Native | Call]:
    """Without those whose values nobody needs."""
    assert result is not None
    wanted, kept = {result.value}, []
    for step in reversed(steps):
        if _writes(step) & wanted:
            wanted |= _reads(step)
            kept.append(step)
    return kept[::-1]


def _together(steps: Sequence[Native | Call]) -> list[Native | Call]:
    """With the products of one x one after the other. No value is written twice, so one may go before what
    does not make its x."""
    rest, out = list(steps), []
    while rest:
        step = rest.pop(0)
        out.append(step)
        if isinstance(step, Native) and step.kind == LINEAR:
            same = [
                other
                for other in itertools.takewhile(lambda other: isinstance(other, Native), rest)
                if other.kind == LINEAR and other.operands[:2] == step.operands[:2]  # type: ignore[union-attr]
            ]
            out += same
            rest = [other for other in rest if not any(other is s for s in same)]
    return out


def _places(steps: Sequence[Native | Call], result: View) -> tuple[dict[int, int], int]:
    """Where the values that instructions write lie in one piece of memory, in bytes, and its size.

    Memory is used again once nobody needs what is in it, and all threads have come so far: they wait for each
    other around products, attention and calls alone.
    """
    last = {value: i for i, step in enumerate(steps) for value in _reads(step) | _writes(step)}
    last[result.value] = len(steps)
    sizes: dict[int, int] = {}
    offsets: dict[int, int] = {}
    free: dict[int, list[int]] = {}  # by size
    leaving: list[int] = []
    end = 0
    waits = True
    for i, step in enumerate(steps):
        waits_before = waits or not isinstance(step, Native) or step.kind in (LINEAR, ATTENTION)
        if waits_before:
            for value in leaving:
                free.setdefault(sizes[value], []).append(offsets[value])
            leaving = []
        if isinstance(step, Native) and step.out not in offsets:
            sizes[step.out] = size = -(-step.nbytes // _ALIGNED) * _ALIGNED
            if free.get(size):
                offsets[step.out] = free[size].pop()
            else:
                offsets[step.out], end = end, end + size
        leaving += [v for v in (_reads(step) | _writes(step)) if last[v] == i and v in offsets]
        waits = not isinstance(step, Native) or step.kind in (LINEAR, ATTENTION)
    return offsets, end
