"""`tinker`, the SDK's program, many times over.

Most of a command's time goes into its imports. So all commands of a test process are forked from one process
that has imported what they import and done nothing else: what runs is the program's own `main`, with its own
arguments, environment, output and exit code. As `python -m tinker.cli` it runs in tests/api/test_auth.py.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.sdk.program", "tinker.cli.__main__", "tinker"])


def run_tinker(
    words: Sequence[str], environment: Mapping[str, str], seconds: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """What `tinker *words` did."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = FORKS.Process(target=_main, args=(list(words), dict(environment), str(out), str(err)))
        process.start()
        process.join(seconds)
        code = process.exitcode
        if code is None:
            process.kill()
            raise AssertionError(f"tinker {' '.join(words)} still runs after {seconds} s: {err.read_text()}")
        return subprocess.CompletedProcess(["tinker", *words], code, out.read_text(), err.read_text())


def _main(words: list[str], environment: dict[str, str], out: str, err: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    from tinker.cli.__main__ import main

    sys.argv = ["tinker", *words]
    main()
