"""When the state of a run that trains is written down, so that a replay after a crash is short."""

from __future__ import annotations

_SHARE = 20.0  # a snapshot costs at most this part of the time since the one before


class Snapshots:
    """The times of one run: for how long it has kept the engine busy since its last snapshot, in seconds, and
    what that one cost."""

    def __init__(self, every: float) -> None:
        self._every = every
        self._worked = 0.0
        self._until = 0.0  # when it was last seen at work
        self._cost = 0.0
        self._under_way = False

    def worked(self, started: float | None, ended: float) -> None:
        """A command was carried out between these two times; commands may overlap."""
        if started is not None:
            self._worked += max(0.0, ended - max(started, self._until))
            self._until = max(self._until, ended)

    @property
    def due(self) -> bool:
        return not self._under_way and self._worked >= max(self._every, _SHARE * self._cost)

    def begin(self) -> None:
        self._under_way, self._worked = True, 0.0

    def end(self, started: float | None, ended: float) -> None:
        """It was written between these two times, or (None) could not be."""
        self._under_way = False
        if started is not None:
            self._cost = max(0.0, ended - started)
            self._until = max(self._until, ended)
