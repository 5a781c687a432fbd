"""Other versions of the SDK than the installed one, each in a folder of its own beside the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinsmith" / "packages"


def newest() -> str:
    """The newest version that the package index has."""
    report = json.loads(_pip("--dry-run", "--ignore-installed", "--no-deps", "--report", "-", "tinker"))
    return str(report["install"][0]["metadata"]["version"])


def package(name: str, version: str) -> Path:
    """A folder to put on the path for this version of a package, installed there if it is not yet. Fails
    where it cannot be had: what is not tried must not look like what passes."""
    folder = CACHE / f"{name}-{version}"
    if not (folder / ".complete").exists():
        _pip("--target", str(folder), "--upgrade", "--no-deps", f"{name}=={version}")
        distribution = metadata.Distribution.at(folder / f"{name}-{version}.dist-info")
        missing = [str(need) for need in _needs(distribution) if not _is_there(need)]
        if missing:
            _pip("--target", str(folder), "--upgrade", "--no-deps", *missing)
        (folder / ".complete").touch()
    return folder


def _needs(distribution: metadata.Distribution) -> list[Requirement]:
    needs = [Requirement(text) for text in distribution.requires or []]
    return [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


def _is_there(need: Requirement) -> bool:
    try:
        return need.specifier.contains(metadata.version(need.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"pip could not install {arguments[-1]}:\n{done.stderr}"
    return done.stdout
