"""The states of recurrent layers while sequences are sampled: a slot for every running sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.packing import Mixer, Segment
from tinsmith.engine.model.recurrent import Apart, apart
from tinsmith.engine.paged_attention import Chunk

_KINDS = ("conv_states", "recurrent_states")


class StatePool:
    """Slots for the states of all mixers of a model.

    A layer's states lie in tensors [slots, ...] of whatever shapes and dtypes its family keeps, which
    are found out by running one token when the pool is made.
    """

    def __init__(self, model: BaseModel, capacity: int, pool_bytes: int) -> None:
        """As many slots as fit into `pool_bytes`, at most `capacity`, at least one."""
        self.model = model
        self._tensors: dict[tuple[int, str, int], Tensor] = {}  # (layer, kind, index of the state)
        sample = _one_token(model)
        self.capacity = max(1, min(capacity, pool_bytes // max(1, _size(sample))))
        for layer, (kind, index), x in sample:
            self._tensors[layer, kind, index] = x.new_zeros(self.capacity, *x.shape[1:])
        self._free = list(range(self.capacity - 1, -1, -1))

    def allocate(self) -> int | None:
        return self._free.pop() if self._free else None

    def free(self, slot: int) -> None:
        self._free.append(slot)

    def copy(self, source: int, target: int) -> None:
        for x in self._tensors.values():
            x[target] = x[source]

    def resume(self, layer: int, slots: Tensor | None) -> Any:
        """A fresh cache of transformers' with the states of `slots` in it, as a batch; None: empty."""
        cache = self.model.new_state()
        if slots is None:
            return cache
        into = cache.layers[layer]
        for (owner, kind, index), x in self._tensors.items():
            if owner == layer:
                into.lazy_initialization(**{kind: x[slots]}, state_idx=index)
                getattr(into, kind)[index].copy_(x[slots])
                into.has_previous_state[index] = True
        return cache

    def store(self, layer: int, slots: Tensor, cache: Any) -> None:
        """Take the states of a batch back into `slots`; more of them than slots are padding."""
        for (owner, kind, index), x in self._tensors.items():
            if owner == layer:
                x[slots] = getattr(cache.layers[layer], kind)[index][: len(slots)]


def state_bytes(model: BaseModel) -> int:
    """What the recurrent layers keep of one sequence, whatever its length."""
    return _size(_one_token(model)) if model.mixers else 0


def _size(states: list[tuple[int, tuple[str, int], Tensor]]) -> int:
    return sum(x.numel() * x.element_size() for _, _, x in states)


def _one_token(model: BaseModel) -> list[tuple[int, tuple[str, int], Tensor]]:
    """(layer, (kind, index), state [1, ...]) of every state that one token leaves behind."""
    cache = model.new_state()
    with torch.no_grad():
        model.plain(torch.zeros(1, dtype=torch.int64, device=model.device), cache)
    found = []
    for layer in model.mixers.values():
        for kind in _KINDS:
            for index, x in getattr(cache.layers[layer], kind).items():
                if x is not None:
                    found.append((layer, (kind, index), x))
    return found


class SampledRecurrence:
    """The sampler's backend: every sequence goes on from its own slot.

    Single tokens of running sequences go together, filled up to whatever number makes that change no bit
    (exactness.py); a chunk of a prompt goes by itself.
    """

    def __init__(
        self, pool: StatePool, segments: Sequence[Segment], chunks: Sequence[tuple[Chunk, int]]
    ) -> None:
        """chunks: each with its sequence's slot, in order of their rows."""
        device, multiple = pool.model.device, pool.model.mixers_padding
        self.pool = pool
        # With the slots to go on from, or None at the beginning of a sequence, and those to write.
        self.groups: list[tuple[Apart, Tensor | None, Tensor]] = []
        batches: dict[int, list[tuple[Chunk, int]]] = {}
        for chunk, slot in chunks:
            joins = chunk.length == 1 and chunk.position and multiple
            batches.setdefault(-1 if joins else slot, []).append((chunk, slot))
        for key, members in batches.items():
            first, slots = members[0][0], [slot for _, slot in members]
            group = apart(
                segments,
                [(c.row, c.length) for c, _ in members],
                first.length,
                device,
                multiple if key == -1 else 1,
            )
            filled = slots + slots[:1] * (group.count - len(slots))
            self.groups.append(
                (
                    group,
                    torch.tensor(filled, device=device) if first.position else None,
                    torch.tensor(slots, device=device),
                )
            )

    def __call__(self, layer: int, mixer: Mixer, hidden: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for group, before, after in self.groups:
            cache = self.pool.resume(layer, before)
            out[group.rows.index_select(0, group.real)] = group.run(mixer, hidden, cache)
            self.pool.store(layer, after, cache)
        return out
