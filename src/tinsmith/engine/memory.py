"""How the device's memory is shared out."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from tinsmith.engine.model.base import ModelError

LEAST = 32 << 20  # bytes beside the base weights, below which there is no use in starting


@dataclass(frozen=True, slots=True)
class Budget:
    """Bounds in bytes: training state and sampling snapshots, the key-value cache, one pass's activations.

    `copies` says whether there is room for the copies of weights that sampling is faster with.
    """

    adapters: int
    cache: int
    passes: int
    copies: bool = True

    @classmethod
    def split(cls, total: int, weights: int, copies: int = 0) -> Budget:
        """What `total` leaves beside the base weights, and beside `copies` if those are a quarter of it at
        most. Raises ModelError if that is nothing."""
        left = total - weights
        if left < LEAST:
            raise ModelError(
                f"the base weights need {weights} bytes and the memory bound is {total}: too little is left "
                "to train or sample. Serve a smaller model or raise --memory"
            )
        copied = copies <= left // 4
        left -= copies if copied else 0
        return cls(adapters=left * 2 // 5, cache=left // 5, passes=left * 2 // 5, copies=copied)


def available_memory(device: torch.device) -> int:
    """Bytes to plan with: 80% of what is free on the device, cgroup limits respected."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * 0.8)
    free = 8 << 30
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for limit in _lines("/sys/fs/cgroup/memory.max"):
        if limit.isdigit():
            free = min(free, int(limit))
    return int(free * 0.8)


def give_back() -> None:
    """Return freed memory to the system, which this process otherwise keeps for its next tensors (see
    process.py)."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
