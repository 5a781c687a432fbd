"""What becomes of a request, and waiting for it.

Waiting is on the event itself: whoever holds a long poll is woken in the same turn of the event loop
in which the outcome arrives.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Literal

from tinsmith.engine.commands import Category

QueueState = Literal["active", "paused_capacity", "paused_rate_limit"]


@dataclass(frozen=True, slots=True)
class Result:
    """It was done. Protobuf bytes or a JSON object."""

    payload: bytes | dict[str, object]


@dataclass(frozen=True, slots=True)
class Failure:
    """It was refused or failed, finally."""

    message: str
    category: Category = "user"


@dataclass(frozen=True, slots=True)
class Lost:
    """A sample that was forgotten; asking for it anew is right."""

    message: str


@dataclass(frozen=True, slots=True)
class Pending:
    """Not yet: ask again."""

    queue_state: QueueState = "active"
    reason: str | None = None


Outcome = Result | Failure | Lost


class PendingRequest:
    """A request on its way. Many may wait for it; its outcome comes once."""

    __slots__ = ("_outcome", "request_id")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    @property
    def outcome(self) -> Outcome | None:
        return self._outcome.result() if self._outcome.done() else None

    def resolve(self, outcome: Outcome) -> None:
        """The first outcome stays."""
        if not self._outcome.done():
            self._outcome.set_result(outcome)

    async def wait(self, seconds: float, closing: asyncio.Future[None]) -> Outcome | None:
        """The outcome, or None when it did not come in time or the server closes."""
        if not self._outcome.done():
            either: set[asyncio.Future[Any]] = {self._outcome, closing}
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return self.outcome
