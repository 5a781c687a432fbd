"""What a recorded program makes of positions alone (a rotation's cosines and sines), looked up by position.

The calls that need nothing but positions are done once for each position, many at a time, and their results
are kept as tables. A step then takes its rows out of these, in place of calling all of it again for a few
rows. Whether a row depends on its own position alone is tried for every piece of a table: where it does not,
there are no tables, and the calls are done in each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

PIECE = 512  # positions that are added to the tables at a time
MOST = 32_768  # positions beyond which a step computes its own
_APART = 16  # positions of a piece that are computed by themselves, too

# The values of the positions [n] that are given, by number: each [1, n, width].
Compute = Callable[[Tensor], dict[int, Tensor]]


class PositionTables:
    """Tables of some values, one row for each position, which grow as positions are asked for."""

    def __init__(self, values: Iterable[int], compute: Compute) -> None:
        self.values = tuple(values)
        self.usable = bool(self.values)
        self._compute = compute
        self._tables: dict[int, Tensor] = {}  # [positions, width]
        self._known = 0

    def covers(self, positions: Tensor) -> bool:
        """Whether all of these can be looked up; makes the tables longer where they must be."""
        if not self.usable:
            return False
        last = int(positions.max())
        while self.usable and self._known <= last < MOST:
            self._grow()
        return self.usable and last < self._known

    def empty(self, value: int, rows: int) -> Tensor:
        """Room for so many rows of a value, as `look_up` fills it: [1, rows, width]."""
        table = self._tables[value]
        return table.new_empty(1, rows, table.shape[1])

    def look_up(self, value: int, positions: Tensor, out: Tensor) -> None:
        """The rows of a value, into `out` [1, rows, width]."""
        table = self._tables[value]
        torch.index_select(table, 0, positions, out=out.view(len(positions), table.shape[1]))

    def _grow(self) -> None:
        """Twice as many positions, at least a piece."""
        with torch.inference_mode(False), torch.no_grad():
            wanted = max(PIECE, min(MOST, 2 * self._known))
            pieces = [self._piece(at) for at in range(self._known, wanted, PIECE)]
            if not all(pieces):
                self.usable = False
                self._tables.clear()
                return
            for value in self.values:
                known = [self._tables[value]] if value in self._tables else []
                self._tables[value] = torch.cat(known + [piece[value] for piece in pieces])
            self._known = wanted

    def _piece(self, first: int) -> dict[int, Tensor]:
        """The rows of some positions by value; nothing where they are not each position's own."""
        positions = torch.arange(first, first + PIECE)
        whole = self._rows(positions)
        for at in (0, PIECE - _APART):
            part = slice(at, at + _APART)
            own = self._rows(positions[part].clone())
            if not all(v in whole and v in own and torch.equal(whole[v][part], own[v]) for v in self.values):
                return {}
        return whole

    def _rows(self, positions: Tensor) -> dict[int, Tensor]:
        made, count = self._compute(positions), len(positions)
        return {
            value: x[0]
            for value, x in made.items()
            if x.dim() == 3 and x.shape[:2] == (1, count) and x.is_contiguous()
        }


def of_positions(reads: Sequence[set[int]], writes: Sequence[set[int]], positions: int) -> list[int]:
    """Which steps need nothing but positions: `reads` and `writes` are the values of each step."""
    known, found = {positions}, []
    for i, (read, written) in enumerate(zip(reads, writes, strict=True)):
        if read and read <= known:
            known |= written
            found.append(i)
    return found
