"""The kernels pass Triton's compiler for an H100 at the sizes of real models, on any machine that has
Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SHARED = 227 << 10  # bytes of shared memory that a block may have on an H100
SPILLED = 128  # bytes per thread that we let a kernel keep in local memory


def test_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    script = Path(__file__).with_name("hopper.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=280
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("KERNEL")]
    assert len({name for name, *_ in lines}) >= 17, "all kernels"
    for name, shared, spilled, matrix in lines:
        assert int(shared) <= SHARED, name
        assert spilled == "?" or int(spilled) <= SPILLED, name
        if name in ("_forward", "_grad_q", "_grad_kv", "_matmul", "_grouped", "_shrink", "_expand", "_outer"):
            assert matrix != "-", f"{name} does not use the matrix units"
