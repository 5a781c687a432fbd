"""A server for a benchmark: a process, a data folder and a key of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def server(*flags: str, orderly: bool = True) -> Iterator[tuple[str, str, Path]]:
    """`tinsmith serve`, ready: (address, key, data folder). At the end it is stopped, or killed with all that
    it still had to do. Raises TimeoutError where it is not ready within a minute."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key, url = f"tml-{secrets.token_hex(8)}", f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-m", "tinsmith", "serve", "--port", str(port), "--data", data, *flags]
        process = subprocess.Popen(
            command,
            env={**os.environ, "TINSMITH_BOOTSTRAP_API_KEY": key},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait(url)
            yield url, key, Path(data)
        finally:
            (process.terminate if orderly else process.kill)()
            process.wait(60)


def _wait(url: str) -> None:
    for _ in range(240):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/api/v1/healthz", timeout=5).close()
            return
        time.sleep(0.25)
    raise TimeoutError(f"no server at {url}")
