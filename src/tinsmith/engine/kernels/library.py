"""The CPU kernels (the .cpp files beside this): built once on this machine with its own C++ compiler,
kept in the user's cache folder, and spoken to through ctypes.

Where there is no compiler, or no vector unit that it is written for, `library()` is None and the torch path
does the same work more slowly. TINSMITH_KERNELS=off asks for that.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_SOURCES = [
    _HERE / name
    for name in (
        "attention.cpp",
        "draw.cpp",
        "elementwise.cpp",
        "linear.cpp",
        "lora.cpp",
        "optimizer.cpp",
        "program.cpp",
    )
]
_HEADERS = [_HERE / name for name in ("attend.h", "linear.h", "product.h", "team.h", "tiles.h", "vector.h")]
_FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-w"]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None where they cannot be had."""
    if os.environ.get("TINSMITH_KERNELS", "on").lower() in ("off", "0", "no"):
        return None
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        log.info("no C++ compiler here: torch's path is taken, which is slower")
        return None
    try:
        return ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        text = getattr(error, "stderr", "") or str(error)
        log.warning("the kernels could not be built, torch's path is taken: %s", text[-400:])
        return None


def _build(compiler: str) -> Path:
    """Compile, unless that has been done for this source, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    target = subprocess.run(
        [compiler, "-march=native", "-E", "-dM", "-x", "c++", os.devnull],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # One OpenMP runtime in the process: two would keep their threads spinning against each other.
    runtime = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    parts = (
        *(s.read_text() for s in (*_SOURCES, *_HEADERS)),
        version,
        target,
        " ".join(_FLAGS),
        *map(str, runtime),
    )
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    folder = _cache_folder()
    path = folder / f"kernels-{digest}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            out = Path(work) / "kernels.so"
            command = [compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(out), *map(str, runtime[:1])]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            os.replace(out, path)
    return path


def _cache_folder() -> Path:
    """A folder that is this user's alone: what lies there is loaded into the process."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "tinsmith" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="tinsmith-kernels-"))


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())
