"""Servers for tests: one that all share, and fresh ones for those who break theirs."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Threads that wait do not spin for long: tests run side by side, and a barrier whose thread has to wait for a
# core would take a time slice each. The library looks at this when it is loaded, with torch.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Whom to trust: one authority whose key nobody has, since tests speak plain HTTP alone. Each HTTP client
# that is made reads the whole bundle, and the usual one takes 15 ms, which is most of a small test.
os.environ.pop("SSL_CERT_DIR", None)
os.environ["SSL_CERT_FILE"] = str(Path(__file__).with_name("authority.pem"))

# Triton's kernels run in its interpreter where there is no GPU. It looks at this when it is imported, which
# transformers does.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["TRITON_INTERPRET"] = "1"

from tests.harness import Raw, Server

# What is imported stays. To look for garbage among it, again and again, doubles the time of collecting tests.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-shaped model of two layers with a byte-level tokenizer and a chat template."""
    from tests.api.doors import TEMPLATE
    from tests.engine.tiny import make_model

    folder = make_model("qwen3", tmp_path_factory.mktemp("models") / "tiny")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that nobody may harm."""
    server = Server(tiny_model, tmp_path_factory.mktemp("server") / "data", "--poll-hold", "20")
    yield server.start()
    server.end()


@pytest.fixture(scope="session")
def _hardy(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tiny_model, tmp_path_factory.mktemp("hardy") / "data", "--poll-hold", "20")
    yield server
    server.end()


@pytest.fixture
def hardy(_hardy: Server) -> Iterator[Server]:
    """A server that may be stopped, killed and started again, on data that all who do so have in common. For
    tests that ask for no flags and for no empty folder: each start costs 3 s of CPU."""
    yield _hardy if _hardy.runs() else _hardy.start()
    if _hardy.runs():
        _hardy.limit_file_size(None, everywhere=True)  # a test that fails leaves no full disk


@pytest.fixture
def make_server(tiny_model: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Servers of one test's own, on a data folder of its own; not started yet."""
    made: list[Server] = []

    def make(*flags: str) -> Server:
        made.append(Server(tiny_model, tmp_path / "data", *flags))
        return made[-1]

    yield make
    for each in made:
        each.end()


@pytest.fixture
def raw(server: Server) -> Raw:
    return server.raw()
