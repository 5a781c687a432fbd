"""Token ids that a sample request wants scored in its prompt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PromptTargets:
    """Token ids to score at prompt positions: cell [i, j] of a [rows, columns] matrix at position i + 1,
    nothing where it is -1. `ids`, and for a CSR matrix `crow` and `col`, are int64 as bytes; without those
    two `ids` are all cells, row by row."""

    rows: int
    columns: int
    ids: bytes
    crow: bytes | None = None
    col: bytes | None = None
