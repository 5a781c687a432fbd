"""Programs written for any version of the SDK work, and get the same numbers from the same calls."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tinker

from tests.harness import KEY, MODEL, Server, exit_code
from tests.sdk import versions

CORE = Path(__file__).parent / "core.py"

# From before passes and results were protobuf; from half a year ago, when passes were JSON; and from
# when the session came to be finished. They are older as time goes by: the newest is looked up.
OLDER = ["0.16.1", "0.22.0", "0.30.4"]


@functools.cache
def core(server: Server, folder: Path | None) -> dict[str, Any]:
    """What the core suite reports with the SDK that lies in `folder`, or with the installed one."""
    environment = {**os.environ, "TINKER_BASE_URL": server.url, "TINKER_API_KEY": KEY, "HF_HUB_OFFLINE": "1"}
    if folder is not None:
        environment["PYTHONPATH"] = str(folder)
    done = subprocess.run(
        [sys.executable, str(CORE), MODEL], env=environment, capture_output=True, text=True, timeout=200
    )
    assert exit_code(done) == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_the_installed_sdk_passes_the_core_suite(server: Server) -> None:
    report = core(server, None)
    assert report["version"] == tinker.__version__
    assert report["models"] == [MODEL]
    assert report["info"] == [MODEL, True, 4]
    assert report["losses"] == sorted(report["losses"], reverse=True)
    assert report["many"] == [3 + i % 5 for i in range(1500)]
    assert report["loaded"] == report["anew"] == report["trained"] != report["forward"]
    assert report["paths"] == [["weights", "state"], ["sampler_weights", "weights"]]
    assert report["sampled"] == report["unnamed"]
    assert [len(tokens) for tokens in report["sampled"]] == [6, 6]
    assert report["topk"] == [None, 2, 2, 2]
    assert report["listed"] == [
        ["sampler_weights/weights", "sampler", False],
        ["weights/state", "training", True],
    ]
    assert report["left"] == ["weights/state"]
    assert report["run"] == [MODEL, 4, "weights/state"]
    for name in ("expires", "in_runs", "session", "in_sessions"):
        assert report[name] in (True, [True]), name
    assert report["refused"] == ["RequestFailedError", True]


def check(server: Server, version: str) -> None:
    theirs, ours = core(server, versions.package("tinker", version)), core(server, None)
    assert theirs.pop("version") == version
    assert theirs == {name: value for name, value in ours.items() if name != "version"}


@pytest.mark.slow
@pytest.mark.parametrize("version", OLDER)
def test_an_older_sdk_gets_the_same_numbers(server: Server, version: str) -> None:
    check(server, version)


@pytest.mark.slow
def test_the_newest_sdk_gets_the_same_numbers(server: Server) -> None:
    check(server, versions.newest())
