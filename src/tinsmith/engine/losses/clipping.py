"""The bounds of a clipped ratio: per token where the datum brings them, else the call's settings."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tinsmith.engine.losses.base import Inputs

BOUNDS = ("clip_low_threshold", "clip_high_threshold")


def clipped(ratio: Tensor, inputs: Inputs, config: Mapping[str, float]) -> Tensor:
    """`ratio` clipped to the bounds, which are ratios themselves."""
    low, high = (inputs.get(name, config[name]) for name in BOUNDS)
    return ratio.clamp(min=low).clamp(max=high)
