"""How many rows a device does in a given time, as measured: what bounds a piece of work that others wait
for."""

from __future__ import annotations

PIECE_SECONDS = 0.05  # of work on a GPU that a decode step may have to wait for
FIRST_ROWS = 2048  # before anything was measured
LEAST_ROWS = 512  # fewer leave a GPU idle


class Pace:
    """A running mean of rows per second, over pieces large enough to tell."""

    def __init__(self) -> None:
        self._rate: float | None = None

    def observe(self, rows: int, seconds: float) -> None:
        if rows >= LEAST_ROWS // 2 and seconds > 0:
            rate = rows / seconds
            self._rate = rate if self._rate is None else self._rate + 0.3 * (rate - self._rate)

    def rows(self, most: int) -> int:
        """Rows of about PIECE_SECONDS, between LEAST_ROWS and `most`."""
        rows = FIRST_ROWS if self._rate is None else int(self._rate * PIECE_SECONDS)
        return min(most, max(LEAST_ROWS, rows))
