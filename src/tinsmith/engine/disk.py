"""Work that waits for a disk, in threads beside the engine's own: it changes nothing but files."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
AT_ONCE = 2
WAIT = 0.01  # seconds that an engine with nothing else to do waits at a time


class Disk:
    """What is under way; everything else here belongs to the engine's thread."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(AT_ONCE, "disk")
        self._then: dict[Future[object], Callable[[], None]] = {}

    def __bool__(self) -> bool:
        """Whether anything is under way."""
        return bool(self._then)

    def do(self, work: Callable[[], T], then: Callable[[Callable[[], T]], None]) -> None:
        """`work` in a thread. `take` later calls `then`, with the function that gives its result or raises
        what it raised."""
        future = self._threads.submit(work)
        self._then[future] = lambda: then(future.result)  # type: ignore[index]

    def take(self) -> bool:
        """Go on with what has ended. Whether there was anything."""
        ended = [future for future in self._then if future.done()]
        for future in ended:
            self._then.pop(future)()
        return bool(ended)

    def wait(self) -> None:
        """For a moment, or until something has ended."""
        concurrent.futures.wait(self._then, WAIT, "FIRST_COMPLETED")
