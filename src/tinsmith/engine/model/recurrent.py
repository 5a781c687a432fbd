"""Layers with a state of their own (linear attention, Mamba, short convolutions) inside packed passes.

Such a layer mixes whatever stands beside each other in its input, so packed sequences must be taken
apart for it: its input becomes a batch [B, L] of whole sequences, padded on the right, where the
state of a causal layer never sees the padding. Its linear layers get their rows back in packed form (see
Places), so adapters and gradients are as everywhere else. The layer's own code and transformers' own
cache class do the rest: nothing here knows a family.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tinsmith.engine.model.attention import PAGE, pad_rows, round_up
from tinsmith.engine.model.packing import Block, Mixer, Pass, Places, Segment, current_pass, running, units

CACHES = ("cache_params", "past_key_values")  # what families call the argument
_OF_ALL_ROWS = frozenset(
    {*CACHES, "attention_mask", "position_ids", "position_embeddings", "use_cache", "cache_position"}
)


def find_mixers(module: nn.Module) -> Iterator[tuple[str, int, nn.Module]]:
    """(name, layer, module) of every layer with a state: they all begin with a convolution over time."""
    for name, child in module.named_modules():
        has_conv = any(isinstance(c, nn.Conv1d) for c in child.children())
        if has_conv and isinstance(getattr(child, "layer_idx", None), int):
            yield name, child.layer_idx, child


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """What a module calls the cache that it takes; None where it takes none."""
    names = inspect.signature(forward).parameters
    return next((name for name in CACHES if name in names), None)


def take_apart(layer: int, module: nn.Module) -> bool:
    """Make a mixer work on sequences apart. False if its forward takes no cache that could be handed in."""
    original = module.forward
    cache = cache_argument(original)
    if cache is None:
        return False
    module.forward = partial(_forward, layer, original, cache)
    return True


def _forward(
    layer: int, original: Callable[..., Tensor], cache: str, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    this = current_pass()
    if this is None or this.recurrent is None:
        return original(hidden_states, *args, **kwargs)
    rest = {name: value for name, value in kwargs.items() if name not in _OF_ALL_ROWS}

    def mixer(x: Tensor, state: Any) -> Tensor:
        return original(x, **{cache: state}, **rest)

    return this.recurrent(layer, mixer, hidden_states[0]).unsqueeze(0)


@dataclass(slots=True)
class Apart:
    """Some sequences of a pass as a batch [count, length]: the pass over their rows alone, which rows of
    the whole pass stand at each place, and which places are real."""

    inner: Pass
    count: int
    length: int
    rows: Tensor  # int64 [count * length]
    real: Tensor  # int64: flat places that are no padding

    def run(self, mixer: Mixer, hidden: Tensor, state: Any) -> Tensor:
        """hidden: [rows of the whole pass, H] -> [real places, H]."""
        x = hidden.index_select(0, self.rows).unflatten(0, (self.count, self.length))
        outer = current_pass()
        self.inner.anchor = None if outer is None else outer.anchor
        self.inner.recomputes = outer is not None and outer.recomputes
        with running(self.inner):
            out = mixer(x, state)
        return out.flatten(0, 1).index_select(0, self.real)


def apart(
    segments: Sequence[Segment],
    spans: Sequence[tuple[int, int]],
    length: int,
    device: torch.device,
    multiple: int = 1,
) -> Apart:
    """The sequences at `spans` (first row, number of rows, at most `length`), in order of their rows; the
    batch is filled up to a multiple of `multiple` sequences with copies of a row."""
    count = round_up(len(spans), multiple)
    of_batch = torch.zeros(count, length, dtype=torch.int64)
    packed = torch.full((count, length), spans[0][0], dtype=torch.int64)
    of_rows: list[Tensor] = []
    inner: list[Segment] = []
    at = index = 0
    for segment in segments:
        begin = at
        blocks: list[Block] = []
        for start, stop, gradients in units(segment):
            first = at
            while index < len(spans) and start <= spans[index][0] < stop:
                row, n = spans[index]
                offsets = torch.arange(length)
                inside = torch.where(offsets < n, offsets, torch.zeros_like(offsets))
                of_batch[index], packed[index] = at + inside, row + inside
                of_rows.append(index * length + torch.arange(n))
                at, index = at + n, index + 1
            if at == first:
                continue
            padding = pad_rows(at - first) - (at - first)
            of_rows.append(of_rows[-1][:1].expand(padding))
            at += padding
            if gradients is not None:
                blocks.append(Block(first, at, gradients))
        if at > begin:
            inner.append(Segment(begin, at, segment.weights, blocks))
    if index != len(spans):
        raise ValueError("a sequence stands outside of the pass's segments, or out of order")
    real = torch.cat([i * length + torch.arange(n) for i, (_, n) in enumerate(spans)])
    places = Places(torch.cat(of_rows).to(device), of_batch.flatten().to(device))
    return Apart(Pass(inner, places=places), count, length, packed.flatten().to(device), real.to(device))


class PackedRecurrence:
    """The training backend: whole sequences from their beginning, no state kept.

    Sequences of one unit and one padded length go together, so that what stands in a batch is decided
    by the request alone.
    """

    def __init__(
        self, segments: Sequence[Segment], spans: Sequence[tuple[int, int]], device: torch.device
    ) -> None:
        ends = [(stop, n) for n, (_, stop, _) in enumerate(u for s in segments for u in units(s))]
        groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
        unit = 0
        for start, n in sorted(spans):
            while start >= ends[unit][0]:
                unit += 1
            groups.setdefault((unit, round_up(n, PAGE)), []).append((start, n))
        # Backward goes from the last to the first, and adds a request's gradients block after block.
        self.groups = [
            apart(segments, members, length, device)
            for (_, length), members in sorted(groups.items(), reverse=True)
        ]

    def __call__(self, layer: int, mixer: Mixer, hidden: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for group in self.groups:
            rows = group.rows.index_select(0, group.real)
            out = out.index_copy(0, rows, group.run(mixer, hidden, None))
        return out
