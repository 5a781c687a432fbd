"""A sampling step's way through the model, and to its tokens, without Python between its operations.

What is recorded of the model's own code (recording.py) is laid out for a number of rows (program_layout.py).
The CPU kernel program.cpp carries it out, and behind it the logits of some rows and the draw of tokens.
Whether a program gives the bits of the model's own code is tried when it is made; where it does not, or
nothing could be recorded, there is none, and the model's own code runs.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinsmith.engine.commands import SampleParams
from tinsmith.engine.kernels import linear
from tinsmith.engine.kernels.attention import Chunks
from tinsmith.engine.kernels.library import library
from tinsmith.engine.kernels.linear import Segments
from tinsmith.engine.kv_cache import PagePool
from tinsmith.engine.model.attention import PADDING, pad_rows
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.packing import Pass, Segment
from tinsmith.engine.paged_attention import Chunk, PagedAttention
from tinsmith.engine.position_tables import PositionTables
from tinsmith.engine.program_layout import FIELDS, Layout, keep
from tinsmith.engine.recording import (
    EMBEDDED,
    POSITIONS,
    Call,
    NotRepeatable,
    Recording,
    generalize,
    record,
)
from tinsmith.engine.sampling import Rules, sample

log = logging.getLogger(__name__)

ROWS = 768  # of a pass up to which a program is taken
_KEPT = 16  # numbers of rows that a program is kept laid out for


@functools.cache
def _run() -> Any:
    function = library().program_run  # type: ignore[union-attr]
    p = ctypes.c_void_p
    function.argtypes, function.restype = [p, ctypes.c_int64, p, p], None
    return function


@dataclass(slots=True)
class Draws:
    """Tokens that a step draws: what is given, and, when it has run, what came out.

    Everything but u stays as it is for as long as the same rows are drawn from in the same way.
    """

    rows: npt.NDArray[np.int64]  # of the hidden states, those whose logits are wanted, in order
    where: Segments  # of those rows
    source: npt.NDArray[np.int64]  # of each draw, its row among those
    rules: Rules
    u: npt.NDArray[np.float64]  # in [0, 1), or below 0 for the likeliest token
    tokens: npt.NDArray[np.int64] = field(init=False)
    logprobs: npt.NDArray[np.float32] = field(init=False)
    logits: Tensor = field(init=False)  # [wanted rows, vocab]
    _hidden: int = 0  # where the hidden states were when what follows was made
    _numbers: npt.NDArray[np.int64] = field(init=False)
    _kept: Any = None

    def __post_init__(self) -> None:
        count = len(self.source)
        self.tokens, self.logprobs = np.zeros(count, np.int64), np.zeros(count, np.float32)

    def numbers(self, hidden: Tensor, head: linear.Matrix, slot: int) -> npt.NDArray[np.int64]:
        """As program.cpp reads them."""
        if self._hidden == hidden.data_ptr():
            return self._numbers
        count = len(self.rows)
        self.logits = hidden.new_empty(count, head.n)
        in_order = bool(self.rows[-1] == count - 1)
        gathered = None if in_order else hidden.new_empty(count, head.k)
        bias, room = (0 if x is None else x.data_ptr() for x in (head.bias, gathered))
        fields = head.k, head.n, head.depth, head.tiles.data_ptr(), bias, self.logits.data_ptr(), head.n, slot
        product = np.array([0, 0, *fields], np.int64)
        rules = self.rules.temperatures, self.u, self.rules.top_k, self.rules.top_p
        given = [x.ctypes.data for x in (self.source, *rules, self.tokens, self.logprobs)]
        numbers = [
            hidden.data_ptr(), hidden.stride(0), self.rows.ctypes.data, count, room, product.ctypes.data,
            self.where.ctypes.data, len(self.where), len(self.source), *given,
        ]  # fmt: skip
        self._hidden, self._kept = hidden.data_ptr(), (product, gathered)
        self._numbers = np.array(numbers, np.int64)
        return self._numbers


class Program:
    """hidden states of packed rows, as BaseModel.hidden gives them, for models that all goes well with."""

    def __init__(self, model: BaseModel, recording: Recording, names: tuple[str, ...]) -> None:
        self.model, self.recording, self.names = model, recording, names
        self._layouts: dict[int, Layout] = {}
        self._computing: dict[int, Layout] = {}  # by the positions whose values they compute
        self._tables = PositionTables(self._computes(PADDING.rows).tabled, self._of_positions)
        # What makes the logits; None where that is more than one product.
        self._head: linear.Matrix | None = None
        if model.head is not None and model.head.packed is not None and len(model.head.packed.matrices) == 1:
            (self._head,), (name,) = model.head.packed.matrices, model.head.packed.names
            self._slot = names.index(name)

    @property
    def draws(self) -> bool:
        """Whether it can go on to logits and tokens."""
        return self._head is not None

    def _computes(self, rows: int) -> Layout:
        if rows not in self._computing:
            self._computing[rows] = Layout(self.recording, rows)
        return self._computing[rows]

    def _of_positions(self, positions: Tensor) -> dict[int, Tensor]:
        return self._computes(len(positions)).computed(positions)

    def where(self, segments: Sequence[Segment]) -> Segments:
        """The segments as the kernels know them; the adapters must outlive it."""
        return linear.segments(
            [(s.start, s.stop, s.weights.table(self.names)) for s in segments if s.weights is not None]
        )

    @classmethod
    def of(cls, model: BaseModel) -> Program | None:
        """A program that has the bits of the model's own code, or None."""
        if not model.packed or model.short is not None:  # each row's frequencies are its sequence's own
            return None
        names = (*(s.name for s in model.slots), "")
        slots = {name: i for i, name in enumerate(names)}
        counts = [n * PADDING.rows for n in (1, 2, 5)]
        try:
            program = cls(model, generalize([record(model, n, slots) for n in counts], counts), names)
            wrong = program._difference()
        except NotRepeatable as reason:
            wrong = str(reason)
        except Exception as error:
            log.debug("%s: no program", model.name, exc_info=error)
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            log.info("%s is sampled by its own code: %s", model.name, wrong)
            return None
        return program

    @torch.no_grad()
    def _difference(self) -> str:
        """What differs from the model's own code, where something does: a prompt in chunks, single tokens,
        sequences together."""
        model = self.model
        pools = PagePool(model, _TRIED_BYTES), PagePool(model, _TRIED_BYTES)
        generator = torch.Generator().manual_seed(0)
        for step in _TRIED:
            total = sum(count for _, count, _ in step)
            padding = (0, pad_rows(total) - total)
            ids = torch.randint(0, model.vocab_size, (total,), generator=generator)
            places = torch.cat([torch.arange(at, at + n) for _, n, at in step])
            ids, places = (torch.nn.functional.pad(x, padding) for x in (ids, places))
            ours, theirs = pools
            attention = PagedAttention(theirs, _chunks(step), len(ids))
            wanted = model.hidden(ids, places, Pass([Segment(0, total, None)], attention))
            numbers = Chunks([(c.row, c.length, c.position, c.pages) for c in _chunks(step)])
            draws = self._tried_draws(total) if self.draws else None
            found = self.run(ids, places, linear.segments([]), ours, numbers, total, draws)
            if not torch.equal(wanted[:total], found[:total]):
                return "a recording of it gives other bits"
            if draws is not None and not self._same_tokens(wanted, draws):
                log.info("%s draws its tokens by its own code: the program's logits are others", model.name)
                self._head = None
        return ""

    @staticmethod
    def _tried_draws(total: int) -> Draws:
        """Of the last row and one before it, by every kind of parameters."""
        rows = np.unique(np.array([total // 2, total - 1]))
        rules = Rules.of(_PARAMS * len(rows))
        source = np.arange(len(rows)).repeat(len(_PARAMS))
        return Draws(rows, linear.segments([]), source, rules, rules.drawn(np.linspace(0, 0.99, len(source))))

    def _same_tokens(self, hidden: Tensor, draws: Draws) -> bool:
        """Whether they are those of the model's own code."""
        padding = pad_rows(len(draws.rows)) - len(draws.rows)
        rows = torch.from_numpy(np.pad(draws.rows, (0, padding)))
        logits = self.model.logits(hidden[rows], Pass([Segment(0, len(draws.rows), None)]))
        params = _PARAMS * len(draws.rows)
        wanted = sample(logits[torch.from_numpy(draws.source)], params, np.linspace(0, 0.99, len(params)), 0)
        return draws.tokens.tolist() == wanted.tokens and draws.logprobs.tolist() == wanted.logprobs

    def run(
        self,
        token_ids: Tensor,
        positions: Tensor,
        where: Segments,
        pool: PagePool,
        chunks: Chunks,
        rows: int,
        draws: Draws | None = None,
    ) -> Tensor:
        """As BaseModel.hidden, for the first `rows` of a padded number of rows; what lies behind them in the
        result is nothing, and the next run overwrites all of it. `draws` gets its results."""
        padded = len(token_ids)
        layout = self._layouts.pop(padded, None) or Layout(self.recording, padded)
        self._layouts[padded] = layout  # the newest last
        if len(self._layouts) > _KEPT:
            del self._layouts[next(iter(self._layouts))]
        layout.set_pages(pool)
        numbers, pages = chunks.pointers
        threads = torch.get_num_threads()
        step = np.array(
            [rows, numbers, chunks.count, pages, where.ctypes.data, len(where), threads], np.int64
        ).ctypes
        values = {EMBEDDED: self.model.embed(token_ids), POSITIONS: positions}
        for value, x in values.items():
            layout.give(value, x)
        *parts, last = layout.parts
        if self._tables.covers(positions):
            layout.look_up(self._tables, positions, values)
            parts = layout.others
        for part in parts:
            self._part(layout, part, values, step, None)
        # The tokens are drawn in the last run of instructions, if that is last and its result has a place.
        at_once = draws is not None and not isinstance(last, Call) and layout.result.value in layout.offsets
        tail = self._tail(draws, layout, values) if draws is not None and at_once else None
        self._part(layout, last, values, step, tail)
        if draws is not None and not at_once:
            tail = self._tail(draws, layout, values)
            _run()(None, 0, step.data, tail.ctypes.data)
        hidden: Tensor = layout.real(layout.result, values)
        return hidden[0]

    @staticmethod
    def _part(
        layout: Layout,
        part: tuple[int, int] | Call,
        values: dict[int, Tensor],
        step: Any,
        tail: npt.NDArray[np.int64] | None,
    ) -> None:
        if isinstance(part, Call):
            keep(part, layout.call(part, values), values)
            for value in part.out:
                layout.give(value, values[value])
        else:
            first, last = part
            address = layout.code_address + first * FIELDS * layout.code.itemsize
            _run()(address, last - first, step.data, None if tail is None else tail.ctypes.data)

    def _tail(self, draws: Draws, layout: Layout, values: dict[int, Tensor]) -> npt.NDArray[np.int64]:
        """What program.cpp is to draw."""
        assert self._head is not None
        return draws.numbers(layout.real(layout.result, values)[0], self._head, self._slot)


_TRIED_BYTES = 1 << 62
_PARAMS = tuple(
    SampleParams(temperature=t, top_k=k, top_p=p, seed=0)
    for t, k, p in ((1.0, -1, 1.0), (0.7, -1, 1.0), (0.0, -1, 1.0), (1.0, 7, 1.0), (1.3, -1, 0.9))
)
# Steps that are tried: (sequence, new tokens, from which position) of each
_TRIED = (
    [(0, 40, 0)],
    [(0, 1, 40)],
    [(0, 30, 41), (1, 9, 0)],
    [(0, 1, 71), (1, 1, 9)],
    [(2, 150, 0), (1, 1, 10)],
)


def _chunks(step: Sequence[tuple[int, int, int]]) -> list[Chunk]:
    chunks, row = [], 0
    for owner, count, position in step:
        chunks.append(Chunk(row, count, position, range(1 + 3 * owner, 4 + 3 * owner)))
        row += count
    return chunks
