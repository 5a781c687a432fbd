"""Where the tokens of a datum came from, as its sender claims: runs that follow each other and together cover
a field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Span:
    """`length` tokens from `offset` on, of a sampled sequence or of the prompt that it was sampled from."""

    kind: Literal["prompt", "sampled"]
    sequence_id: str
    offset: int
    length: int
