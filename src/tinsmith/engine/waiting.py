"""Sequences that wait to be sampled: a queue for each share key, so that a flood stands behind itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Generic, Protocol, TypeVar

from tinsmith.engine.shares import Shares


class _Shared(Protocol):
    @property
    def key(self) -> str: ...


S = TypeVar("S", bound=_Shared)


class Waiting(Generic[S]):
    """First come, first served within a key; the key that runs least for its weight goes first."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._queues: dict[str, deque[S]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[S]:
        for queue in self._queues.values():
            yield from queue

    def append(self, sequence: S) -> None:
        self._queues.setdefault(sequence.key, deque()).append(sequence)
        self._length += 1

    def appendleft(self, sequence: S) -> None:
        """Take back one that had to make room: it goes before the others of its key."""
        self._queues.setdefault(sequence.key, deque()).appendleft(sequence)
        self._length += 1

    def remove(self, sequence: S) -> None:
        queue = self._queues[sequence.key]
        if queue[0] is sequence:
            queue.popleft()
        else:
            queue.remove(sequence)
        self._length -= 1
        if not queue:
            del self._queues[sequence.key]

    def head(self, running: Mapping[str, int]) -> S:
        """The next one, where `running` says how many sequences of each key run. Not on an empty queue."""
        first, *others = self._queues
        if others:
            first = self._shares.order(self._queues, running)[0]
        return self._queues[first][0]
