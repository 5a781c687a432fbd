"""Which commands the engine has beside each other, where one of them may be its death.

A command that was at the engine when it died is begun again. Where the engine dies of that too, it is begun
once more, with no other command beside it: if the engine dies even then, it was this command.
"""

from __future__ import annotations

import asyncio

IN_COMPANY = 2  # deaths of the engine, after which a command that was there each time has none beside it
DEADLY = 3  # deaths, after which it is given up
# The same where it was the whole server that died, of which somebody with a power switch may be the cause.
MOST_LIVES = 10


class Company:
    """All training commands that are at the engine."""

    def __init__(self) -> None:
        self._inside = 0
        self._alone = False
        self._changed = asyncio.Condition()

    async def enter(self, *, alone: bool) -> None:
        """Wait until a command may go to the engine: beside others, or `alone`."""
        if not alone and not self._alone:
            self._inside += 1
            return
        async with self._changed:
            await self._changed.wait_for(lambda: not self._alone)
            if alone:
                self._alone = True  # those that come now wait
                await self._changed.wait_for(lambda: not self._inside)
            self._inside += 1

    async def leave(self, *, alone: bool) -> None:
        async with self._changed:
            self._inside -= 1
            if alone:
                self._alone = False
            self._changed.notify_all()
