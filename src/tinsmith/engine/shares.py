"""Who may use the device when several want it: each share key gets its part, by weight.

The engine knows no tenants. Commands carry an opaque key and a weight (commands.Share), and this is where
they are told apart. Every key that has work is *entitled* to its weight's part of the time that passes, and
*receives*, in each step that it takes part in, the time that its own rows would have taken alone. Packed
steps make the second sum larger than the first, so most of the time nobody lacks anything and everybody
runs together. A key that lacks time (a few rows in the large steps of somebody else's flood) goes
on alone, with others that lack time, until it has caught up. So a key never runs slower than its part of
what it would do alone; and since the device never waits for a key without work, nothing is held back for one.

What is lacking is told apart from what others have: accounts matter beside each other alone. So time that
was lost to all is nobody's, and of what was gained nobody saves up more than the one who gained least.

Company decides about time alone, never about a result.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from tinsmith.engine.commands import Share

SLACK = 0.001  # seconds that a key may lack before others stand back
_MOST = 2.0  # seconds: what is lacking beyond is forgotten,
_LEAST = -1.0  # and so is what was received beyond
_FALLS, _RISES = 0.3, 0.02  # by how much of what is measured an estimate moves
LEAST_ROWS = 16  # fewer take as long
HOLD = 0.025  # seconds: who mostly comes back sooner is waited for
RECENT = 15.0  # seconds for which a key without work is expected back


@dataclass(slots=True)
class _Account:
    weight: float = 1.0
    commands: int = 0  # that are not answered
    lacks: float = 0.0  # seconds
    left: float = float("-inf")  # when it last had work
    away: float = 4 * HOLD  # seconds for which it mostly has none between two commands; no more than that
    waits: bool = False  # whether what it last asked for stands behind a whole pass of another's


@dataclass(slots=True)
class Shares:
    """The accounts of all keys, and who may run."""

    clock: Callable[[], float] = time.monotonic
    _accounts: dict[str, _Account] = field(default_factory=dict)
    _active: dict[str, _Account] = field(default_factory=dict)
    _step: float = 0.0  # seconds that the last step took
    _there: frozenset[str] = frozenset()  # the keys that had work during it
    _behind: bool = False  # whether somebody lacks so much that others stand back

    def enter(self, share: Share, *, waits: bool = False) -> None:
        """A command of this key has come; whether it `waits` for the end of a pass that is under way."""
        account = self._accounts.setdefault(share.key, _Account())
        account.weight, account.waits = share.weight, waits
        account.commands += 1
        if account.commands == 1:
            self._come(share.key, account)

    def _come(self, key: str, account: _Account) -> None:
        """A key has work again."""
        away = self.clock() - account.left
        account.away += 0.3 * (min(away, 4 * HOLD) - account.away)
        if away >= RECENT:
            account.lacks = 0.0
        elif account.lacks < 0:  # while it was away, others had what it had received before them
            account.lacks = min(account.lacks + away, 0.0)
        others = [each for other, each in self._active.items() if other in self._there and other != key]
        self._active[key] = account
        if others:
            # It came at some time during the step that has just ended, and could not be seen before: as if it
            # had come at the beginning. Without this a key that asks again and again for a little would
            # stand behind a step of somebody else's each time, and then share the next one.
            owed = self._step * self._part(account)
            account.lacks += owed
            total = sum(each.weight for each in others)
            for each in others:
                each.lacks -= owed * each.weight / total
        self._settle()

    def leave(self, key: str) -> None:
        """A command of this key was answered."""
        account = self._accounts[key]
        account.commands -= 1
        if account.commands == 0:
            account.left = self.clock()
            del self._active[key]
            if not self._active:
                self._there = frozenset()
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

    def expects(self) -> float:
        """Seconds to wait for a key that will be back in a moment, as it was before, and would then stand
        behind a whole pass: where those who have work have had their parts."""
        if any(account.lacks > 0 for account in self._active.values()):
            return 0.0
        now = self.clock()
        due = [
            account.left + 1.5 * account.away - now
            for account in self._accounts.values()
            if account.waits and not account.commands and account.away <= HOLD and account.lacks >= 0
        ]
        return max(due, default=0.0)

    def idle(self, seconds: float) -> None:
        """Nobody had the device, for the sake of a key that was expected: those who have work are owed it."""
        for key, account in self._active.items():
            if key in self._there:
                account.lacks += seconds
        self._settle()

    def charge(self, seconds: float, alone: Mapping[str, float]) -> None:
        """A step of `seconds` has passed, of which each key has received what it would have taken alone."""
        self._step, self._there = seconds, frozenset(self._active)
        if len(self._active) < 2:
            for account in self._active.values():  # it had the whole device
                account.lacks = min(account.lacks, max(account.lacks - seconds, 0.0))
            return
        total = sum(account.weight for account in self._active.values())
        for key, account in self._active.items():
            account.lacks += seconds * account.weight / total - alone.get(key, 0.0)
        self._settle()

    def stand_aside(self) -> None:
        """Nobody who lacks time could run: let everybody."""
        self._behind = False

    def order(self, keys: Iterable[str], used: Mapping[str, float]) -> list[str]:
        """Keys, the one first that has used least of something for its weight."""
        return sorted(keys, key=lambda key: used.get(key, 0.0) / self.weight(key))

    def parts(self, amount: int, wanted: Mapping[str, int]) -> dict[str, int]:
        """`amount` of something for those who want so much of it: by weight, to nobody more than it wants,
        and one at least."""
        found: dict[str, int] = {}
        left = amount
        by_want = sorted(wanted, key=lambda key: wanted[key] / self.weight(key))
        weights = sum(map(self.weight, by_want))
        for key in by_want:
            found[key] = min(wanted[key], max(1, int(left * self.weight(key) / weights)))
            left -= found[key]
            weights -= self.weight(key)
        return found

    def _part(self, account: _Account) -> float:
        return account.weight / sum(each.weight for each in self._active.values())

    def _settle(self) -> None:
        """Look who is behind; see the module's second paragraph."""
        active = self._active.values()
        self._behind = False
        if len(active) < 2:
            return
        total = sum(account.lacks for account in active)
        if total > 0:
            shift = -total / sum(account.weight for account in active)
        else:
            shift = max(0.0, -max(account.lacks / account.weight for account in active))
        for account in active:
            account.lacks = min(max(account.lacks + shift * account.weight, _LEAST), _MOST)
            self._behind |= account.lacks > SLACK

    def _forget(self) -> None:
        """Keep no accounts of those who have not been here for long."""
        now = self.clock()
        for key in [k for k, a in self._accounts.items() if not a.commands and now - a.left > RECENT]:
            del self._accounts[key]


class Costs:
    """How long a step of so many rows takes when nothing disturbs it, as measured at four sizes to each power
    of two. It falls quickly and rises slowly: other processes make some steps many times as long as the rest,
    and a mean of those would credit a few rows in the steps of somebody else's flood with more than they
    received."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[float, float]] = {}  # by size: rows, seconds
        self._sizes: list[int] = []

    def observe(self, rows: int, seconds: float) -> None:
        size = _size(rows)
        if size not in self._known:
            bisect.insort(self._sizes, size)
            self._known[size] = float(rows), seconds
            return
        before, known = self._known[size]
        moved = _FALLS if seconds / rows < known / before else _RISES
        self._known[size] = before + moved * (rows - before), known + moved * (seconds - known)

    def seconds(self, rows: int) -> float | None:
        """Of a step of so many rows: between two sizes along the line between them, beyond the known ones in
        proportion, which is the least that it can be. None before anything was measured."""
        if not self._sizes:
            return None
        at = bisect.bisect_left(self._sizes, _size(rows))
        if at < len(self._sizes) and (self._sizes[at] == _size(rows) or at == 0):
            known, took = self._known[self._sizes[at]]
            return took if self._sizes[at] == _size(rows) else took * rows / known
        below, less = self._known[self._sizes[at - 1]]
        if at == len(self._sizes):
            return less * rows / below
        above, more = self._known[self._sizes[at]]
        return less + (more - less) * (rows - below) / (above - below)

    def estimate(self, rows: int, whole_rows: int, whole_seconds: float) -> float:
        """Seconds that `rows` would take alone, where a step of `whole_rows` took `whole_seconds`: at least
        their part of it, and at most all of it."""
        part = whole_seconds * rows / whole_rows
        known = self.seconds(rows)
        return part if known is None else min(max(known, part), whole_seconds)

    def within(self, seconds: float) -> int:
        """How many rows a step of so many seconds has at the best rate that was measured, or one of twice as
        many as the shortest step takes if that is more: where a few rows take as long as many there is
        nothing to gain by few."""
        if not self._known:
            return LEAST_ROWS
        shortest = min(took for _, took in self._known.values())
        rate = max(rows / took for rows, took in self._known.values())
        return max(LEAST_ROWS, int(rate * max(seconds, 2 * shortest)))


def _size(rows: int) -> int:
    return math.ceil(4 * math.log2(rows)) if rows > 1 else 0
