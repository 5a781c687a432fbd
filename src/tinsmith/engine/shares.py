"""Who may use the device when several want it: each share key gets its part, by weight.

The engine knows no tenants. Commands carry an opaque key and a weight (commands.Share), and this is where
they are told apart. Every key that has work is *entitled* to its weight's part of the time that passes, and
*receives*, in each pass that it takes part in, the time that its own rows would have taken alone. Packed
passes make the second sum larger than the first, so most of the time nobody lacks anything and everybody
runs together. A key that lacks time (a few rows in the large passes of somebody else's flood) goes
on alone, with others that lack time, until it has caught up. So a key never runs slower than its part of
what it would do alone; and since the device never waits for a key without work, nothing is held back for one.

Company decides about time alone, never about a result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from tinsmith.engine.commands import Share

SLACK = 0.02  # seconds that a key may lack before others stand back
_MOST = 2.0  # seconds: what is lacking beyond is forgotten,
_LEAST = -1.0  # and so is what was received beyond
_FALLS, _RISES = 0.3, 0.02  # by how much of what is measured an estimate moves
RECENT = 5.0  # seconds for which a key without work is expected back


@dataclass(slots=True)
class _Account:
    weight: float = 1.0
    commands: int = 0  # that are not answered
    lacks: float = 0.0  # seconds
    left: float = float("-inf")  # when it last had work


@dataclass(slots=True)
class Shares:
    """The accounts of all keys, and who may run."""

    clock: Callable[[], float] = time.monotonic
    _accounts: dict[str, _Account] = field(default_factory=dict)
    _active: dict[str, _Account] = field(default_factory=dict)
    _step: float = 0.0  # seconds that the last step took
    _behind: bool = False  # whether somebody lacks so much that others stand back

    def enter(self, share: Share) -> None:
        """A command of this key has come."""
        account = self._accounts.setdefault(share.key, _Account())
        account.weight = share.weight
        account.commands += 1
        if account.commands == 1:
            self._active[share.key] = account
            # It came at some time during the step that has just ended, and could not be seen before: as if it
            # had come at the beginning. Without this a key that asks again and again for a little would
            # stand behind a step of somebody else's each time, and then share the next one.
            came_back = self.clock() - account.left < RECENT
            account.lacks = max(account.lacks, 0.0) if came_back else 0.0
            if len(self._active) > 1:
                account.lacks += self._step * self._part(account)
            self._settle()

    def leave(self, key: str) -> None:
        """A command of this key was answered."""
        account = self._accounts[key]
        account.commands -= 1
        if account.commands == 0:
            account.left = self.clock()
            del self._active[key]
            self._settle()
            if len(self._accounts) > 10_000:
                self._forget()

    def weight(self, key: str) -> float:
        return self._accounts[key].weight if key in self._accounts else 1.0

    @property
    def several(self) -> bool:
        """Whether more than one key has work."""
        return len(self._active) > 1

    @property
    def contended(self) -> bool:
        """Whether more than one key has work or had some a moment ago: steps are kept short then."""
        if len(self._active) > 1:
            return True
        now = self.clock()
        recent = sum(
            account.commands == 0 and now - account.left < RECENT for account in self._accounts.values()
        )
        return recent + len(self._active) > 1

    def may(self, key: str) -> bool:
        """Whether this key may run in the next step."""
        if not self._behind:
            return True
        account = self._active.get(key)
        return account is None or account.lacks > 0

    def charge(self, seconds: float, alone: Mapping[str, float]) -> None:
        """A step of `seconds` has passed, of which each key has received what it would have taken alone."""
        self._step = seconds
        if len(self._active) < 2:
            for account in self._active.values():  # it had the whole device
                account.lacks = min(account.lacks, 0.0)
            return
        total = sum(account.weight for account in self._active.values())
        for key, account in self._active.items():
            lacks = account.lacks + seconds * account.weight / total - alone.get(key, 0.0)
            account.lacks = min(max(lacks, _LEAST), _MOST)
        self._settle()

    def stand_aside(self) -> None:
        """Nobody who lacks time could run: let everybody."""
        self._behind = False

    def order(self, keys: Iterable[str], used: Mapping[str, float]) -> list[str]:
        """Keys, the one first that has used least of something for its weight."""
        return sorted(keys, key=lambda key: used.get(key, 0.0) / self.weight(key))

    def _part(self, account: _Account) -> float:
        return account.weight / sum(each.weight for each in self._active.values())

    def _settle(self) -> None:
        self._behind = len(self._active) > 1 and any(
            account.lacks > SLACK for account in self._active.values()
        )

    def _forget(self) -> None:
        """Keep no accounts of those who have not been here for long."""
        now = self.clock()
        for key in [k for k, a in self._accounts.items() if not a.commands and now - a.left > RECENT]:
            del self._accounts[key]


class Costs:
    """How long a step of so many rows takes when nothing disturbs it, as measured, per power of two. It falls
    quickly and rises slowly: other processes make some steps many times as long as the rest, and a mean of
    those would credit a few rows in the passes of somebody else's flood with more than they received."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def observe(self, rows: int, seconds: float) -> None:
        bucket = _bucket(rows)
        known = self._seconds.get(bucket)
        self._seconds[bucket] = (
            seconds if known is None else known + (_FALLS if seconds < known else _RISES) * (seconds - known)
        )

    def estimate(self, rows: int, whole_rows: int, whole_seconds: float) -> float:
        """Seconds that `rows` would take alone. Without a measurement of that size, their part of a
        step of `whole_rows` in `whole_seconds`, which is the least that it can be."""
        part = whole_seconds * rows / whole_rows
        known = self._seconds.get(_bucket(rows))
        return part if known is None else min(max(known, part), whole_seconds)


def _bucket(rows: int) -> int:
    return max(rows - 1, 0).bit_length()
