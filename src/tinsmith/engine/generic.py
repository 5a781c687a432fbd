"""Sampling on the generic path: every sequence by itself, behind a cache of transformers' own class.

For models whose attention or recurrence this server's own backends do not know. Nothing of a sequence stands
beside another's, so its result cannot depend on company; the price is a pass per sequence and token.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.packing import Mixer, Pass, Segment, running
from tinsmith.engine.paged_attention import Chunk

_PROBE = 65  # tokens of the longer one of two sequences whose caches are measured


class CachePool:
    """Slots for whole caches of transformers' own class, for models on the generic path.

    Each is of one sequence, as long as that is. `most_tokens` is how long one may be.
    """

    def __init__(self, model: BaseModel, capacity: int, pool_bytes: int) -> None:
        """As many slots as fit into `pool_bytes` with full contexts, at most `capacity`, at least one."""
        self.model = model
        short, long = _cache_size(model, 1), _cache_size(model, _PROBE)
        each = max(1, (long - short) // (_PROBE - 1))
        self.most_tokens = min(model.max_context, max(1, (pool_bytes - short) // each))
        self.capacity = max(1, min(capacity, pool_bytes // max(1, short + each * model.max_context)))
        self._caches: list[Any] = [None] * self.capacity
        self._free = list(range(self.capacity - 1, -1, -1))

    def allocate(self) -> int | None:
        return self._free.pop() if self._free else None

    def free(self, slot: int) -> None:
        self._caches[slot] = None
        self._free.append(slot)

    def copy(self, source: int, target: int) -> None:
        self._caches[target] = copy.deepcopy(self._caches[source])

    def resume(self, slot: int, position: int) -> Any:
        """The cache of a sequence that has come to `position`; a new one at its beginning."""
        if position == 0:
            self._caches[slot] = self.model.new_state()
        return self._caches[slot]


def _cache_size(model: BaseModel, tokens: int) -> int:
    """Bytes of transformers' cache of one sequence."""
    cache = model.new_state()
    with torch.no_grad():
        model.plain(torch.zeros(tokens, dtype=torch.int64, device=model.device), cache)
    found: dict[int, int] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            for x in value.values() if isinstance(value, dict) else [value]:
                if isinstance(x, Tensor):
                    found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(found.values())


class SampledApart:
    """The sampler's backend: each chunk goes on behind its own sequence's cache."""

    def __init__(
        self, pool: CachePool, segments: Sequence[Segment], chunks: Sequence[tuple[Chunk, int]]
    ) -> None:
        """chunks: each with its sequence's slot."""
        self.pool = pool
        # Some families put all that they have cached through a projection, so a pass over one sequence has
        # as many rows as it will: its one segment has no end.
        self.chunks = [
            (chunk, slot, Pass([Segment(0, sys.maxsize, segment.weights)]))
            for chunk, slot in chunks
            for segment in segments
            if segment.start <= chunk.row < segment.stop
        ]

    def __call__(self, layer: int, mixer: Mixer, hidden: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for chunk, slot, inner in self.chunks:
            rows = slice(chunk.row, chunk.row + chunk.length)
            cache = self.pool.resume(slot, chunk.position)
            with running(inner):
                out[rows] = mixer(hidden[rows].unsqueeze(0), cache)[0]
        return out
