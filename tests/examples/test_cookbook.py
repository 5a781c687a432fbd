"""The lightest recipes of Tinker's cookbook, unmodified, against a server with the model that ships."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sysconfig
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from tests.examples import cookbook
from tests.examples.test_examples import ROOT, SHIPPED
from tests.harness import KEY, Server, exit_code
from tests.sdk.versions import CACHE

pytestmark = pytest.mark.slow

# What the cookbook imports beside what is here. What it says it needs cannot all be had everywhere.
NEEDS = "chz blobfile termcolor datasets tiktoken aiohttp cloudpickle tqdm math-verify pylatexenc".split()


@pytest.fixture(scope="module")
def python() -> Path:
    """A Python with the cookbook and what it needs, on top of this one's packages. Fails where it cannot be
    had: what is not tried must not look like what passes."""
    folder = CACHE / f"cookbook-{metadata.version('tinker_cookbook')}"
    python = folder / "bin" / "python"
    made = (folder / ".complete").exists()
    if not made:
        venv.create(folder, with_pip=True, clear=True)
    # Every time: it may have been made for another checkout, which is gone.
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "these.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if not made:
        constraints = ["-c", str(ROOT / "constraints.txt")]
        install = [str(python), "-m", "pip", "install", "--quiet", *constraints, *NEEDS]
        done = subprocess.run(install, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, f"what the cookbook needs could not be installed:\n{done.stderr[-2000:]}"
        (folder / ".complete").touch()
    return python


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cookbook")
    cookbook.make_folder(folder, SHIPPED)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(SHIPPED, tmp_path_factory.mktemp("cooks") / "data", "--dtype", "auto")
    server.models = {cookbook.MODEL: SHIPPED}
    yield server.start()
    server.end()


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("sl_loop", 3),
        ("preference.shorter.train", 2),
        ("preference.dpo.train", 2),
        ("distillation.on_policy_distillation", 2),
        ("sdft.train", 2),
    ],
)
def test_a_recipe_runs_as_it_is(
    server: Server, python: Path, folder: Path, tmp_path: Path, name: str, steps: int
) -> None:
    log = tmp_path / "log"
    environment = {
        **{each: value for each, value in os.environ.items() if each != "PYTHONPATH"},
        "TINKER_BASE_URL": server.url,
        "TINKER_API_KEY": KEY,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }
    done = subprocess.run(
        cookbook.command(python, name, log),
        env=environment, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert exit_code(done) == 0, done.stderr[-4000:]
    metrics = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in metrics if any("time" in each for each in row)]) >= steps
    assert all(math.isfinite(value) for row in metrics for value in row.values() if isinstance(value, float))
    checkpoints = [json.loads(line) for line in (log / "checkpoints.jsonl").read_text().splitlines()]
    assert checkpoints[-1]["name"] == "final"
    with server.sdk() as client:
        resumed = client.create_training_client_from_state(checkpoints[-1]["state_path"]).result()
        assert resumed.get_info().model_data.model_name == cookbook.MODEL
