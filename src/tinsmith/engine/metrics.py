"""Figures of an engine's life: what it has computed, and how long that took. Plain numbers, cheap to keep.

They count work where it is done, also work that is done again; what a request is charged for is in its
answer (Done.usage).
"""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass, field

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(slots=True)
class Histogram:
    """How many values were at most as large as each bound, and larger than the one before."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def figures(self) -> dict[str, object]:
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.total}


@dataclass(slots=True)
class Metrics:
    """`tokens` by kind (train, prefill, cached_prefill, sample); `put_off` counts sequences that had to make
    room. Seconds of a training pass, of a sampling step, of an optimizer step, and from a sample's arrival
    to its first token; the part of a pass's rows, and of a step's places, that was filled."""

    tokens: Counter[str] = field(default_factory=Counter)
    put_off: int = 0
    train_pass_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    sample_step_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    optim_step_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    first_token_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    train_pass_fill: Histogram = field(default_factory=lambda: Histogram(FRACTIONS))
    sample_step_fill: Histogram = field(default_factory=lambda: Histogram(FRACTIONS))

    def figures(self) -> dict[str, object]:
        """For commands.GetStatus."""
        kinds = ("train", "prefill", "cached_prefill", "sample")
        histograms = {
            name: value.figures()
            for name in self.__dataclass_fields__
            if isinstance(value := getattr(self, name), Histogram)
        }
        return {
            "tokens": {kind: self.tokens[kind] for kind in kinds},
            "put_off": self.put_off,
            "histograms": histograms,
        }
