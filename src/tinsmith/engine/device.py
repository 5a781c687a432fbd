"""Which device to compute on, and in what."""

from __future__ import annotations

import os

import torch

from tinsmith.engine.kernels import gpu
from tinsmith.engine.model.base import ModelError


def pick_device(name: str) -> torch.device:
    """auto: a GPU where there is one. Raises ModelError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "--device cuda: torch sees no CUDA device here; use --device cpu, or install a CUDA build"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bf16 on a GPU and on CPUs with instructions for it, else fp32."""
    if name == "auto":
        fast = device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def make_deterministic(device: torch.device) -> None:
    """One order for every sum on this GPU, whatever the batch, for the rest of the process. Raises ModelError
    where there are no kernels that have it."""
    if not gpu.takes(device):
        raise ModelError(
            f"--deterministic needs the Triton kernels, which do not serve {device}: "
            f"{gpu.trouble(device.index or 0)}"
        )
    gpu.CHOICE.deterministic = True
    # Before cuBLAS is first called; and sums of scattered rows without atomics, where torch has such a way.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    gpu.module("invariant").replace("cuda")
