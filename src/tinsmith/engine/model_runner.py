"""A step's way through the model: the new tokens of its sequences as packed rows, hidden states, logits.

Rows of one adapter stand together, padded to a number of rows that changes no bit of a product. Single tokens
go through the GPU's own decoding step where there is one, up to program.ROWS rows through a recorded program,
and everything else through the model's own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from tinsmith.engine import program
from tinsmith.engine.generic import CachePool, SampledApart
from tinsmith.engine.kernels import gpu
from tinsmith.engine.kernels.attention import Chunks
from tinsmith.engine.kernels.linear import Segments
from tinsmith.engine.kv_cache import PagePool
from tinsmith.engine.model.attention import PAGE, pad_rows
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.lora import AdapterWeights
from tinsmith.engine.model.packing import Pass, RecurrentBackend, Segment
from tinsmith.engine.model.vision import Part
from tinsmith.engine.paged_attention import Chunk, PagedAttention
from tinsmith.engine.program import Draws, Program
from tinsmith.engine.sample_requests import SampledSequence, siblings
from tinsmith.engine.sample_scheduler import Plan
from tinsmith.engine.sampling import Drawn, Rules, streams, uniforms, uniforms_at
from tinsmith.engine.states import SampledRecurrence, StatePool

if TYPE_CHECKING:
    from tinsmith.engine.decoding import Decoder

Placed = tuple[SampledSequence, int, int]
"""A sequence, the first of its rows in a step, and how many they are."""

_ROOM = 4  # pages by which sequences may grow before a step is built anew


@dataclass(slots=True)
class Step:
    """The packed rows of a step, and what came out of it.

    ready: of the sequences all of whose tokens are computed then, in order, the rows that their next tokens
    are drawn from. draws: where they are drawn at once, those of a sequence and, behind it, of the siblings
    that begin with it.
    """

    placed: list[Placed]
    segments: list[Segment]
    ids: torch.Tensor  # int64 [rows], padded
    positions: torch.Tensor  # int64 [rows], or [3, rows] where there are images
    chunks: list[Chunk]
    ready: list[tuple[SampledSequence, int]]
    images: list[Part]
    with_images: bool
    hidden: torch.Tensor | None = None
    draws: Draws | None = None
    again: Again | None = None  # what is needed to do it again with the next tokens


@dataclass(slots=True)
class Again:
    """A step of single tokens that the same sequences may take once more: its arrays are changed in place.

    Valid as long as these sequences run, their rows in this order, on the pages that they have had and those
    that have been added (`epoch` of the scheduler).
    """

    plan: list[SampledSequence]
    epoch: int
    where: Segments
    chunks: Chunks
    ids: npt.NDArray[np.int64]  # the step's own, as are positions
    positions: npt.NDArray[np.int64]
    streams: npt.NDArray[np.uint64]
    drawn: npt.NDArray[np.uint64]  # the position of each token that is drawn


class ModelRunner:
    """What computes the steps of one base model, with any mix of adapters."""

    def __init__(self, model: BaseModel, pool: PagePool, states: StatePool | CachePool | None) -> None:
        self.model, self.pool, self.states = model, pool, states
        self.program: Program | None = None
        self.decoder: Decoder | None = None
        self._last: Step | None = None
        if states is None and model.short is None and gpu.takes(model.device, model.dtype):
            from tinsmith.engine.decoding import Decoder  # needs Triton

            self.decoder = Decoder(model, pool)

    def pack(self) -> None:
        """Make the copies of the weights that a step on a CPU is faster with."""
        if self.decoder is None:
            self.model.pack()
            self.program = Program.of(self.model)

    def run(self, plan: Plan, epoch: int) -> Step:
        """Compute a step. epoch: of the scheduler, which counts what has been taken off a sequence."""
        step = self._again(plan, epoch)
        if step is None:
            self._last = None
            step = self._build(plan)
            self._compute(step, plan, epoch)
            self._last = step if step.again is not None else None
        return step

    def forget(self) -> None:
        """Hold on to no sequence: nothing runs."""
        self._last = None

    def _build(self, plan: Plan) -> Step:
        groups: dict[int, list[tuple[SampledSequence, int]]] = {}
        for sequence, count in plan:
            groups.setdefault(sequence.request.serial, []).append((sequence, count))
        segments: list[Segment] = []
        chunks: list[Chunk] = []
        placed: list[Placed] = []
        ready: list[tuple[SampledSequence, int]] = []
        ids: list[int] = []
        positions: list[int] = []
        of_images: list[tuple[int, torch.Tensor]] = []  # row, positions [3, count] of a sequence with images
        images: list[Part] = []
        for members in groups.values():
            start = len(ids)
            for sequence, count in members:
                first = sequence.computed
                chunks.append(Chunk(len(ids), count, first, sequence.pages))
                placed.append((sequence, len(ids), count))
                if first + count == len(sequence.tokens):
                    ready.append((sequence, len(ids) + count - 1))
                if sequence.request.expanded is not None:
                    images += sequence.request.expanded.within(len(ids), first, count)
                    of_images.append((len(ids), sequence.request.expanded.places(first, count)))
                ids += sequence.tokens[first : first + count]
                positions += range(first, first + count)
            stop = len(ids)
            if not self.model.mixes_rows:
                _pad(ids, positions)
                stop = len(ids)
            segments.append(Segment(start, stop, members[0][0].request.weights))
        _pad(ids, positions)
        places = torch.tensor(positions)
        if of_images:
            places = places.repeat(3, 1)
            for row, own in of_images:
                places[:, row : row + own.shape[1]] = own
        return Step(placed, segments, torch.tensor(ids), places, chunks, ready, images, bool(of_images))

    def _compute(self, step: Step, plan: Plan, epoch: int) -> None:
        rows = len(step.ids)
        visual = self.model.vision.visual(step.images) if self.model.vision is not None else None
        if self.program is not None and visual is None and not step.with_images and rows <= program.ROWS:
            self._by_program(self.program, step, plan, epoch)
            return
        device = self.model.device
        attention = PagedAttention(self.pool, step.chunks, rows)
        recurrent: RecurrentBackend | None = None
        slots = [sequence.slot for sequence, _, _ in step.placed if sequence.slot is not None]
        if isinstance(self.states, StatePool):
            chunks = list(zip(step.chunks, slots, strict=True))
            recurrent = SampledRecurrence(self.states, step.segments, chunks)
        elif self.states is not None:
            chunks = list(zip(step.chunks, slots, strict=True))
            recurrent = SampledApart(self.states, step.segments, chunks)
        this = Pass(step.segments, attention, recurrent)
        spans = [(row, count, len(sequence.tokens)) for sequence, row, count in step.placed]
        this.long = self.model.long_rows(spans, rows)
        step.hidden = self.model.hidden(step.ids.to(device), step.positions.to(device), this, visual)

    def _by_program(self, run: Program, step: Step, plan: Plan, epoch: int) -> None:
        where = run.where(step.segments)
        numbers = [(c.row, c.length, c.position, c.pages) for c in step.chunks]
        chunks = Chunks(numbers, _ROOM)
        if run.draws and step.ready:
            drawn = [(s, i) for s, _ in step.ready for i in (s.index, *siblings(s))]
            params = [s.request.command.params for s, _ in drawn]
            rules = Rules.of(params)
            seeded = streams([p.seed for p in params], [i for _, i in drawn])
            at = np.array([len(s.tokens) for s, _ in drawn], np.uint64)
            source = [row for row, (s, _) in enumerate(step.ready) for _ in range(1 + len(siblings(s)))]
            step.draws = Draws(
                np.array([row for _, row in step.ready], np.int64),
                run.where(_together([s.request.weights for s, _ in step.ready])),
                np.array(source, np.int64),
                rules,
                rules.drawn(uniforms_at(seeded, at)),
            )
            single = all(count == 1 for _, _, count in step.placed)
            if single and len(step.ready) == len(step.placed) == len(drawn):
                own = step.ids.numpy(), step.positions.numpy()
                step.again = Again([s for s, _ in plan], epoch, where, chunks, *own, seeded, at)
        rows = step.segments[-1].stop
        step.hidden = run.run(step.ids, step.positions, where, self.pool, chunks, rows, step.draws)

    def _again(self, plan: Plan, epoch: int) -> Step | None:
        """The last step once more, with the tokens that came out of it, if the plan is that."""
        step = self._last
        if step is None or step.again is None or self.program is None or step.draws is None:
            return None
        last = step.again
        if epoch != last.epoch or [s for s, _ in plan] != last.plan or any(n != 1 for _, n in plan):
            return None
        rows = len(step.placed)
        at = last.chunks.numbers[:, 2]
        at += 1
        for i in np.flatnonzero(at % PAGE == 0):  # they have begun a page
            number = int(at[i]) // PAGE
            if number >= last.chunks.room[i]:
                return None
            last.chunks.pages[last.chunks.numbers[i, 3] + number] = step.placed[i][0].pages[number]
        last.ids[:rows] = step.draws.tokens
        last.positions[:rows] = at
        last.drawn += np.uint64(1)
        step.draws.u[:] = step.draws.rules.drawn(uniforms_at(last.streams, last.drawn))
        self.program.run(
            step.ids, step.positions, last.where, self.pool, last.chunks, step.segments[-1].stop, step.draws
        )
        return step

    def logits(
        self, hidden: torch.Tensor, rows: Sequence[int], weights: Sequence[AdapterWeights | None]
    ) -> torch.Tensor:
        """Logits of some rows; rows of one adapter stand together."""
        index: list[int] = []
        keep: list[int] = []
        segments: list[Segment] = []
        for own in _together(weights):
            keep += range(len(index), len(index) + own.stop - own.start)
            start = len(index)
            index += rows[own.start : own.stop]
            if not self.model.mixes_rows:
                _pad(index)
            segments.append(Segment(start, len(index), own.weights))
        _pad(index)
        logits = self.model.logits(hidden[torch.tensor(index, device=hidden.device)], Pass(segments))
        return logits if len(keep) == len(index) else logits[torch.tensor(keep, device=logits.device)]

    def decode(self, part: Sequence[SampledSequence]) -> Drawn:
        """A step of single tokens, each of which is drawn at once; those of one adapter stand together."""
        assert self.decoder is not None
        from tinsmith.engine.decoding import Row

        commands = [s.request.command for s in part]
        draws = uniforms(
            [c.params.seed for c in commands], [s.index for s in part], [len(s.tokens) for s in part]
        )
        rows = [
            Row(s.tokens[-1], s.computed, s.pages, s.request.weights, c.params, float(u), c.topk_sample)
            for s, c, u in zip(part, commands, draws, strict=True)
        ]
        return self.decoder.run(rows)


def _together(weights: Sequence[AdapterWeights | None]) -> list[Segment]:
    """Rows of one adapter each, where those of one stand together."""
    segments: list[Segment] = []
    for i, own in enumerate(weights):
        if not segments or segments[-1].weights is not own:
            segments.append(Segment(i, i, own))
        segments[-1].stop = i + 1
    return segments


def _pad(*rows: list[int]) -> None:
    """Fill up to a number of rows that changes no bit of a product."""
    for values in rows:
        values += [0] * (pad_rows(len(values)) - len(values))
