"""What is of positions alone is looked up, with the bits of what computes it, or not at all."""

from __future__ import annotations

import torch
from torch import Tensor

from tinsmith.engine.position_tables import MOST, PIECE, PositionTables, of_positions

ROTATION = 7  # the number of a value


def angles(positions: Tensor) -> Tensor:
    return positions[:, None].float() * torch.arange(1, 33) / 32


def cosines(positions: Tensor) -> dict[int, Tensor]:
    return {ROTATION: angles(positions).cos().bfloat16()[None]}


def test_rows_are_those_that_would_be_computed_however_far_the_tables_have_grown() -> None:
    tables = PositionTables([ROTATION], cosines)
    for positions in ([0, 3, 3, 9], [PIECE - 1, PIECE, 0, 1], [5 * PIECE + 3, 2, 1, 0]):
        asked = torch.tensor(positions)
        assert tables.covers(asked)
        out = tables.empty(ROTATION, len(asked))
        tables.look_up(ROTATION, asked, out)
        assert torch.equal(out, cosines(asked)[ROTATION])


def test_positions_beyond_the_most_are_computed() -> None:
    tables = PositionTables([ROTATION], cosines)
    assert tables.covers(torch.tensor([MOST - 1]))
    assert not tables.covers(torch.tensor([0, MOST]))
    assert tables.covers(torch.tensor([0]))


def test_rows_that_depend_on_the_longest_position_are_not_looked_up() -> None:
    def stretched(positions: Tensor) -> dict[int, Tensor]:
        return {ROTATION: (angles(positions) / max(1, int(positions.max()) // 100)).cos()[None]}

    assert not PositionTables([ROTATION], stretched).covers(torch.tensor([1]))


def test_values_of_another_shape_are_not_looked_up() -> None:
    assert not PositionTables([ROTATION], lambda p: {ROTATION: angles(p).T[None]}).covers(torch.tensor([1]))
    assert not PositionTables([], cosines).covers(torch.tensor([1]))


def test_steps_of_positions_alone_are_found() -> None:
    embedded, positions = 0, 1
    reads = [{positions}, {2}, {embedded}, {3, 4}, set()]
    writes = [{2}, {3}, {4}, {5}, {6}]
    assert of_positions(reads, writes, positions) == [0, 1]
