"""A step's way through the model: the new tokens of its sequences as packed rows, hidden states, logits.

Rows of one adapter stand together, padded to a number of rows that changes no bit of a product. Single tokens
go through the GPU's own decoding step where there is one, up to program.ROWS rows through a recorded program,
and everything else through the model's own code.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tinsmith.engine import program
from tinsmith.engine.generic import CachePool, SampledApart
from tinsmith.engine.kernels import gpu
from tinsmith.engine.kv_cache import PagePool
from tinsmith.engine.model.attention import pad_rows
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.lora import AdapterWeights
from tinsmith.engine.model.packing import Pass, RecurrentBackend, Segment
from tinsmith.engine.model.vision import Part
from tinsmith.engine.paged_attention import Chunk, PagedAttention
from tinsmith.engine.program import Program
from tinsmith.engine.sample_requests import SampledSequence
from tinsmith.engine.sample_scheduler import Plan
from tinsmith.engine.sampling import Drawn, uniforms
from tinsmith.engine.states import SampledRecurrence, StatePool

if TYPE_CHECKING:
    from tinsmith.engine.decoding import Decoder

Placed = tuple[SampledSequence, int, int]
"""A sequence, the first of its rows in a step, and how many they are."""


class ModelRunner:
    """What computes the steps of one base model, with any mix of adapters."""

    def __init__(self, model: BaseModel, pool: PagePool, states: StatePool | CachePool | None) -> None:
        self.model, self.pool, self.states = model, pool, states
        self.program: Program | None = None
        self.decoder: Decoder | None = None
        if states is None and model.short is None and gpu.takes(model.device, model.dtype):
            from tinsmith.engine.decoding import Decoder  # needs Triton

            self.decoder = Decoder(model, pool)

    def pack(self) -> None:
        """Make the copies of the weights that a step on a CPU is faster with."""
        if self.decoder is None:
            self.model.pack()
            self.program = Program.of(self.model)

    def hidden(self, plan: Plan) -> tuple[torch.Tensor, list[Placed]]:
        """Compute a step: final hidden states [rows, hidden], and whose rows they are."""
        groups: dict[int, list[tuple[SampledSequence, int]]] = {}
        for sequence, count in plan:
            groups.setdefault(sequence.request.serial, []).append((sequence, count))
        segments: list[Segment] = []
        chunks: list[Chunk] = []
        placed: list[Placed] = []
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
        device = self.model.device
        attention = PagedAttention(self.pool, chunks, len(ids))
        recurrent: RecurrentBackend | None = None
        slots = [sequence.slot for sequence, _, _ in placed if sequence.slot is not None]
        if isinstance(self.states, StatePool):
            recurrent = SampledRecurrence(self.states, segments, list(zip(chunks, slots, strict=True)))
        elif self.states is not None:
            recurrent = SampledApart(self.states, segments, list(zip(chunks, slots, strict=True)))
        places = torch.tensor(positions)
        if of_images:
            places = places.repeat(3, 1)
            for row, own in of_images:
                places[:, row : row + own.shape[1]] = own
        visual = self.model.vision.visual(images) if self.model.vision is not None else None
        if self.program is not None and visual is None and not of_images and len(ids) <= program.ROWS:
            hidden = self.program.run(torch.tensor(ids), places, segments, attention, segments[-1].stop)
        else:
            this = Pass(segments, attention, recurrent)
            spans = [(row, count, len(sequence.tokens)) for sequence, row, count in placed]
            this.long = self.model.long_rows(spans, len(ids))
            hidden = self.model.hidden(torch.tensor(ids, device=device), places.to(device), this, visual)
        return hidden, placed

    def logits(
        self, hidden: torch.Tensor, rows: Sequence[int], weights: Sequence[AdapterWeights | None]
    ) -> torch.Tensor:
        """Logits of some rows; rows of one adapter stand together."""
        index: list[int] = []
        keep: list[int] = []
        segments: list[Segment] = []
        at = 0
        for _, group in itertools.groupby(zip(rows, weights, strict=True), key=lambda pair: id(pair[1])):
            members = [row for row, _ in group]
            keep += range(len(index), len(index) + len(members))
            start = len(index)
            index += members
            if not self.model.mixes_rows:
                _pad(index)
            segments.append(Segment(start, len(index), weights[at]))
            at += len(members)
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


def _pad(*rows: list[int]) -> None:
    """Fill up to a number of rows that changes no bit of a product."""
    for values in rows:
        values += [0] * (pad_rows(len(values)) - len(values))
