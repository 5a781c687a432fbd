"""A run's commands that wait for their turn, by seq_id, and whose turn it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .futures import PendingRequest


@dataclass(slots=True)
class Entry:
    """A logged command on its way to the engine. `body` may have been left in the log."""

    seq_id: int
    request: PendingRequest
    kind: str
    encoding: str
    body: bytes | None
    body_key: str | None
    arrived_at: float
    refused: bool = False
    key_id: str = ""
    again: bool = False  # it was done before a crash, and has its outcome
    suspect: bool = False  # it may have been at the engine when that died
    attempts: int = 0  # how often it has been begun again
    loaded: str | None = None  # the checkpoint that it took when it was first begun


class Line:
    def __init__(self, next_seq: int) -> None:
        self.next_seq = next_seq
        # Up to here all numbers have had their turn once: in a replay those that are not there are skipped.
        self._before = next_seq
        self._waiting: dict[int, Entry] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def turn(self) -> int:
        """The number that has not had its turn yet, nor any behind it."""
        return max(self.next_seq, self._before)

    @property
    def last(self) -> int:
        return max(self._waiting, default=0)

    @property
    def head(self) -> Entry | None:
        """The command whose turn it is, if it is there."""
        return self._waiting.get(self.next_seq)

    @property
    def gap(self) -> bool:
        """Whether those that are there wait for one that is not."""
        return bool(self._waiting) and self.next_seq not in self._waiting

    def put(self, entry: Entry) -> None:
        self._waiting[entry.seq_id] = entry

    def pop(self) -> Entry:
        """Take the head."""
        entry = self._waiting.pop(self.next_seq)
        self.next_seq += 1
        self._skip()
        return entry

    def put_back(self, entry: Entry) -> None:
        """As if it had not been taken."""
        self._before = self.turn
        self._waiting[entry.seq_id] = entry
        self.next_seq = entry.seq_id

    def skip_to(self, seq_id: int) -> None:
        """All numbers below have had their turn."""
        self.next_seq = max(self.next_seq, seq_id)

    def rewind(self, entries: Iterable[Entry]) -> None:
        """Begin anew with these, which have had their turn once."""
        self._before = self.turn
        self._waiting = {seq_id: entry for seq_id, entry in self._waiting.items() if seq_id >= self._before}
        for entry in entries:
            self._waiting[entry.seq_id] = entry
        self.next_seq = min(
            (seq_id for seq_id in self._waiting if seq_id < self._before), default=self._before
        )

    def _skip(self) -> None:
        if self.next_seq < self._before and self.next_seq not in self._waiting:
            behind = (seq_id for seq_id in self._waiting if self.next_seq < seq_id < self._before)
            self.next_seq = min(behind, default=self._before)

    def clear(self) -> list[Entry]:
        """Take all, in order; whatever turn it was, it has been had."""
        entries = [self._waiting[seq_id] for seq_id in sorted(self._waiting)]
        self._waiting = {}
        self.next_seq = max(self.turn, entries[-1].seq_id + 1 if entries else 0)
        return entries
