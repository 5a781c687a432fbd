"""Which devices the Triton kernels serve: the one place that decides between them and torch's own operations.

They serve CUDA devices where Triton is installed and its kernels give what torch gives, which is tried once,
on the device itself. Where they do not, everything works through torch's operations, more slowly, and the log
says why. TINSMITH_KERNELS=off asks for that. On a CPU they run in Triton's interpreter alone, for the tests
(`interpret`).

Nothing here imports Triton before it is known to be there and wanted.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

log = logging.getLogger(__name__)

_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(slots=True)
class Choice:
    """This process's settings. deterministic: one tile and one order for every sum, so that a result does not
    depend on the batch. interpreted: the kernels serve the CPU."""

    deterministic: bool = False
    interpreted: bool = False


CHOICE = Choice()


def takes(device: torch.device, dtype: torch.dtype | None = None) -> bool:
    """Whether the kernels serve tensors of this kind here."""
    if dtype is not None and dtype not in _DTYPES:
        return False
    return (
        CHOICE.interpreted
        if device.type == "cpu"
        else device.type == "cuda" and not trouble(device.index or 0)
    )


def module(name: str) -> Any:
    """A module of this package that needs Triton."""
    return importlib.import_module(f"tinsmith.engine.kernels.{name}")


@contextmanager
def interpret() -> Iterator[None]:
    """Let the kernels serve the CPU meanwhile, in Triton's interpreter."""
    before, CHOICE.interpreted = CHOICE.interpreted, True
    try:
        yield
    finally:
        CHOICE.interpreted = before


@contextmanager
def deterministic(wanted: bool = True) -> Iterator[None]:
    """Set that choice meanwhile."""
    before, CHOICE.deterministic = CHOICE.deterministic, wanted
    try:
        yield
    finally:
        CHOICE.deterministic = before


@functools.cache
def trouble(index: int) -> str:
    """Why the kernels do not serve this CUDA device; empty where they do."""
    reason = _look(torch.device("cuda", index))
    if reason:
        log.warning("cuda:%d has no Triton kernels, torch's operations are slower: %s", index, reason)
    return reason


def _look(device: torch.device) -> str:
    if os.environ.get("TINSMITH_KERNELS", "on").lower() in ("off", "0", "no"):
        return "TINSMITH_KERNELS is off"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than what they are written for (Ampere)"
    try:
        from tinsmith.engine.kernels.trial import differences

        return differences(device)
    except Exception as error:
        return f"trying them failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
