"""What an organization and its projects may use: budgets, rates, and how much at once.

An organization's limits and those of the project in question hold together. Samples and calls beyond one are
refused with its name, what is used, and when it resets; a training request waits for its turn instead, and
says so. Rates are buckets that hold a minute's worth and fill evenly. What a request costs in tokens is known
when it is done, so a bucket may be overdrawn; what is owed is paid back before the next request goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Literal

from tinsmith.engine.commands import Share
from tinsmith.store import Store
from tinsmith.store import limits as stored
from tinsmith.store.scope import SERVER

from .errors import OverBudget, OverLimit
from .prices import GIGABYTE, plain

log = logging.getLogger("tinsmith.service.limits")

Name = Literal[
    "monthly_spend_usd", "concurrent_runs", "samples_in_flight", "requests_per_minute",
    "tokens_per_minute", "storage_gb", "weight",
]  # fmt: skip

WHOLE: frozenset[str] = frozenset(
    {"concurrent_runs", "samples_in_flight", "requests_per_minute", "tokens_per_minute"}
)
ABOUT: dict[Name, str] = {
    "monthly_spend_usd": "dollars in a calendar month (UTC)",
    "concurrent_runs": "training runs that are held for training at a time",
    "samples_in_flight": "sampling requests that are not answered yet",
    "requests_per_minute": "training requests, samples and other calls in a minute; polling is free",
    "tokens_per_minute": "tokens trained, prefilled and sampled in a minute",
    "storage_gb": "GB (10^9 bytes) of checkpoints",
    "weight": "the organization's part of the device where several want it (1 unless set)",
}
DEFAULT = ""  # in place of an organization: what holds for those that have no value of their own

_LOOK_EVERY = 1.0  # seconds after which a changed limit holds at the latest
_MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Who:
    """Whose work something is."""

    org_id: str
    project_id: str
    session_id: str
    user_id: str
    key_id: str


@dataclass(frozen=True, slots=True)
class Reached:
    """A limit that stands in the way. `used` and `allowed` are in the limit's unit."""

    name: Name
    project_id: str  # empty: the whole organization's
    used: Decimal
    allowed: Decimal
    resets: float | None  # seconds since 1970; None: when something ends

    @property
    def resets_in(self) -> float | None:
        return None if self.resets is None else max(0.0, self.resets - time.time())

    def __str__(self) -> str:
        whose = f"project {self.project_id}" if self.project_id else "organization"
        text = (
            f"limit {self.name} of your {whose} is reached: {plain(self.used)} of {plain(self.allowed)}"
            f" {_UNITS[self.name]}"
        )
        left = self.resets_in
        if left is None:
            return f"{text}; {_ENDS[self.name] if self.allowed else 'nothing is allowed'}"
        return f"{text}; there is room again in {max(1, math.ceil(left))} s, at {self.resets_at()}"

    def resets_at(self) -> str | None:
        if self.resets is None:
            return None
        moment = datetime.fromtimestamp(math.ceil(self.resets), UTC)
        return moment.isoformat().replace("+00:00", "Z")

    def fields(self) -> dict[str, object]:
        """For a program."""
        return {
            "limit": self.name,
            "scope": "project" if self.project_id else "organization",
            "project_id": self.project_id or None,
            "used": plain(self.used),
            "allowed": plain(self.allowed),
            "resets_at": self.resets_at(),
        }


_UNITS: dict[str, str] = {
    "monthly_spend_usd": "dollars spent this month",
    "concurrent_runs": "training runs at a time",
    "samples_in_flight": "samples in flight",
    "requests_per_minute": "requests in the last minute",
    "tokens_per_minute": "tokens in the last minute",
    "storage_gb": "GB stored",
}
_ENDS: dict[str, str] = {
    "concurrent_runs": "there is room as soon as the session of one of them finishes or falls silent",
    "samples_in_flight": "there is room as soon as one of them is answered",
    "storage_gb": "delete checkpoints, or give them a TTL, to make room",
}


def read_value(name: str, text: str) -> Decimal:
    """A limit's value. Raises ValueError, which says what would be right."""
    if name not in ABOUT:
        raise ValueError(f"{name[:40]!r} is no limit; known are: {', '.join(ABOUT)}")
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{name}: must be a number, not {text[:40]!r}") from None
    text = text[:40]
    if name == "weight" and not (value.is_finite() and Decimal("0.001") <= value <= 1000):
        raise ValueError(f"weight: must be from 0.001 to 1000, not {text}")
    if not value.is_finite() or not 0 <= value <= Decimal(10**15):
        raise ValueError(f"{name}: must be from 0 to 10^15, not {text}")
    if name in WHOLE and value != value.to_integral_value():
        raise ValueError(f"{name}: must be a whole number, not {text}")
    exponent = value.as_tuple().exponent
    if isinstance(exponent, int) and exponent < -12:
        raise ValueError(f"{name}: has more than 12 places: {text}")
    return abs(value)  # -0 is 0


@dataclass(slots=True)
class _Bucket:
    """A minute's worth, filling evenly; what is overdrawn is paid back first."""

    size: float
    level: float
    at: float

    def fill(self, size: float, now: float) -> None:
        if size != self.size:  # the limit has changed; what was used stays used
            self.level += size - self.size
            self.size = size
        self.level = min(self.size, self.level + (now - self.at) * self.size / _MINUTE)
        self.at = now

    def wait(self) -> float:
        """Seconds until a whole one is there."""
        lacking = 1.0 - self.level
        if lacking <= 0:
            return 0.0
        return lacking * _MINUTE / self.size if self.size > 0 else math.inf


Place = tuple[str, str]  # an organization and one of its projects, or "" for all of them


def places(who: Who) -> tuple[Place, ...]:
    whole = (who.org_id, "")
    return (whole, (who.org_id, who.project_id)) if who.project_id else (whole,)


class Limits:
    """All limits, how much of each is used, and who waits."""

    def __init__(
        self, store: Store, spent: Callable[[Place], Decimal], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`spent` says how many dollars a place has spent this month."""
        self._store = store
        self._spent = spent
        self._clock = clock
        self._values: dict[tuple[str, str, str], Decimal] = {}
        self._buckets: dict[tuple[Place, Name], _Bucket] = {}
        self._samples: Counter[Place] = Counter()
        self._runs: dict[str, Who] = {}  # that hold a place
        self._queue: dict[str, Who] = {}  # that wait for one, in order
        self._changed = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._look()
        self._watch = asyncio.get_running_loop().create_task(self._keep_looking())

    def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()

    async def _keep_looking(self) -> None:
        """Limits are set by another process, on the same database."""
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            try:
                await self._look()
            except Exception:
                log.exception("limits could not be read; it is tried again")

    async def _look(self) -> None:
        rows = await self._store.read(lambda connection: stored.every(connection, SERVER))
        self.set_values({(row.org_id, row.project_id, row.name): row.value for row in rows})

    def set_values(self, values: Mapping[tuple[str, str, str], Decimal]) -> None:
        """By organization (DEFAULT: those without a value of their own), project ("": all) and name."""
        if values != self._values:
            self._values = dict(values)
            self.wake()

    def allowed(self, place: Place, name: Name) -> Decimal | None:
        """A limit's value, or None where there is none."""
        org_id, project_id = place
        if project_id:
            return self._values.get((org_id, project_id, name))
        own = self._values.get((org_id, "", name))
        return own if own is not None else self._values.get((DEFAULT, "", name))

    def share(self, org_id: str) -> Share:
        """What the engine tells an organization's work by, and its weight. The key tells nothing of it."""
        key = hashlib.blake2b(org_id.encode(), digest_size=8).hexdigest()
        return Share(key, float(self.allowed((org_id, ""), "weight") or 1))

    # Money, and what samples and calls are refused for

    def check_spend(self, who: Who) -> None:
        """Raises OverBudget."""
        for place in places(who):
            allowed = self.allowed(place, "monthly_spend_usd")
            if allowed is not None and (spent := self._spent(place)) >= allowed:
                raise OverBudget(
                    Reached("monthly_spend_usd", place[1], spent, allowed, _next_month(time.time()))
                )

    def check_call(self, who: Who) -> None:
        """Count a call. Raises OverLimit, and then it does not count."""
        reached = self._over_rate(who, ("requests_per_minute",))
        if reached is not None:
            raise OverLimit(reached)
        self._take(who, "requests_per_minute", 1)

    def begin_sample(self, who: Who) -> None:
        """Count a sample, which is in flight until end_sample. Raises OverBudget, OverLimit."""
        self.check_spend(who)
        for place in places(who):
            allowed, used = self.allowed(place, "samples_in_flight"), self._samples[place]
            if allowed is not None and used >= allowed:
                raise OverLimit(Reached("samples_in_flight", place[1], Decimal(used), allowed, None))
        reached = self._over_rate(who, ("requests_per_minute", "tokens_per_minute"))
        if reached is not None:
            raise OverLimit(reached)
        self._take(who, "requests_per_minute", 1)
        for place in places(who):
            self._samples[place] += 1

    def end_sample(self, who: Who) -> None:
        for place in places(who):
            self._samples[place] -= 1
            if not self._samples[place]:
                del self._samples[place]

    def used_tokens(self, who: Who, tokens: int) -> None:
        """So many tokens have been computed."""
        self._take(who, "tokens_per_minute", tokens)

    def limits_storage(self, who: Who) -> bool:
        return any(self.allowed(place, "storage_gb") is not None for place in places(who))

    def over_storage(self, who: Who, stored_bytes: Mapping[str, int]) -> Reached | None:
        """Whether nothing more may be stored, where the organization's projects hold so many bytes."""
        for place in places(who):
            allowed = self.allowed(place, "storage_gb")
            whole = sum(stored_bytes.values()) if not place[1] else stored_bytes.get(place[1], 0)
            used = Decimal(whole) / GIGABYTE
            if allowed is not None and used >= allowed:
                return Reached("storage_gb", place[1], used, allowed, None)
        return None

    # What training requests wait for

    def pass_training(self, who: Who, run_id: str, *, tokens: bool) -> Reached | None:
        """Let a run's next request go on, or say what it waits for. `tokens`: whether it computes some."""
        if (reached := self._over_runs(who, run_id)) is not None:
            return reached
        self._queue.pop(run_id, None)
        self._runs[run_id] = who
        rates: tuple[Name, ...] = ("requests_per_minute", "tokens_per_minute")
        if (reached := self._over_rate(who, rates if tokens else rates[:1])) is None:
            self._take(who, "requests_per_minute", 1)
        return reached

    def leave(self, run_id: str) -> None:
        """A run is not held for training any more, nor does it wait to be."""
        waited = self._queue.pop(run_id, None)
        if self._runs.pop(run_id, None) is not None or waited is not None:
            self.wake()

    def moved(self, run_id: str, project_id: str) -> None:
        """A run belongs to another project now: there it counts, and may find room."""
        for held in (self._runs, self._queue):
            if run_id in held:
                held[run_id] = replace(held[run_id], project_id=project_id)
        self.wake()

    def _over_runs(self, who: Who, run_id: str) -> Reached | None:
        if run_id in self._runs:
            return None
        self._queue[run_id] = who  # one that waits keeps its place
        if (reached := self._full(who)) is not None:
            return reached
        for other, whose in self._queue.items():
            if other == run_id:
                break
            if whose.org_id == who.org_id and self._full(whose) is None:
                return self._runs_of(who)  # there is room for one that has waited longer
        return None

    def _full(self, who: Who) -> Reached | None:
        reached = self._runs_of(who)
        return reached if reached is not None and reached.used >= reached.allowed else None

    def _runs_of(self, who: Who) -> Reached | None:
        """The limit on concurrent runs that is nearest to being reached, if there is one."""
        nearest: Reached | None = None
        for place in places(who):
            allowed = self.allowed(place, "concurrent_runs")
            if allowed is None:
                continue
            used = Decimal(sum(place in places(each) for each in self._runs.values()))
            if nearest is None or allowed - used < nearest.allowed - nearest.used:
                nearest = Reached("concurrent_runs", place[1], used, allowed, None)
        return nearest

    async def change(self, seconds: float) -> None:
        """Wait until something may have become free, for so long at most."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)

    def wake(self) -> None:
        """Let everybody look again who waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    # Rates

    def _over_rate(self, who: Who, names: tuple[Name, ...]) -> Reached | None:
        for place in places(who):
            for name in names:
                bucket = self._bucket(place, name)
                if bucket is not None and (wait := bucket.wait()) > 0:
                    used = Decimal(math.ceil(bucket.size - bucket.level))
                    resets = time.time() + wait if math.isfinite(wait) else None
                    return Reached(name, place[1], used, Decimal(bucket.size), resets)
        return None

    def _take(self, who: Who, name: Name, amount: int) -> None:
        for place in places(who):
            bucket = self._bucket(place, name)
            if bucket is not None:
                bucket.level -= amount

    def _bucket(self, place: Place, name: Name) -> _Bucket | None:
        allowed = self.allowed(place, name)
        if allowed is None:
            self._buckets.pop((place, name), None)
            return None
        now, size = self._clock(), float(allowed)
        bucket = self._buckets.setdefault((place, name), _Bucket(size, size, now))
        bucket.fill(size, now)
        return bucket

    # Looking at it

    @property
    def waiting(self) -> int:
        """Runs that wait for a place among the concurrent ones."""
        return len(self._queue)


def _next_month(now: float) -> float:
    today = datetime.fromtimestamp(now, UTC)
    year, month = divmod(today.year * 12 + today.month, 12)
    return datetime(year, month + 1, 1, tzinfo=UTC).timestamp()
