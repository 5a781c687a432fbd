"""Optimizer steps over an adapter's flat buffers, a family a file."""

from __future__ import annotations

from tinsmith.engine.optimizers.adamw import adamw
from tinsmith.engine.optimizers.dimuon import dimuon

__all__ = ["adamw", "dimuon"]
