"""The house's one rule: dependencies go downwards, and nobody imports what is not theirs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tinsmith

SOURCE = Path(tinsmith.__file__).parent

# What each part may import of Tinsmith, and of what its work is made.
ALLOWED = {
    "wire": {"wire"},
    "blobs": {"blobs", "wire"},
    "store": {"store", "wire"},
    "service": {"service", "store", "blobs", "wire", "settings", "engine.commands"},
    "api": {"api", "service", "store", "wire"},
    "settings.py": {"engine.commands"},
    "engine": {"engine", "wire", "blobs"},
}
FORBIDDEN = {
    "wire": {"torch", "transformers", "sqlalchemy", "starlette", "uvicorn"},
    "blobs": {"torch", "transformers", "sqlalchemy", "starlette", "uvicorn"},
    "store": {"torch", "transformers", "starlette", "uvicorn"},
    "service": {"torch", "transformers", "sqlalchemy", "alembic", "starlette", "uvicorn"},
    "api": {"torch", "transformers", "sqlalchemy", "alembic"},
    "engine": {"sqlalchemy", "alembic", "starlette", "uvicorn"},
}


def _imports(file: Path) -> set[str]:
    """The full names of the modules that a file imports."""
    package = ["tinsmith", *file.relative_to(SOURCE).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{name}.{alias.name}" for alias in node.names)
    return found


def _files(part: str) -> list[Path]:
    place = SOURCE / part
    return (
        [place]
        if place.is_file()
        else [file for file in place.rglob("*.py") if "migrations" not in file.parts]
    )


@pytest.mark.parametrize("part", ALLOWED)
def test_nothing_imports_upwards(part: str) -> None:
    for file in _files(part):
        for name in _imports(file):
            if name.startswith("tinsmith.") and name != "tinsmith.__version__":
                inner = name.removeprefix("tinsmith.")
                assert any(inner == ok or inner.startswith(f"{ok}.") for ok in ALLOWED[part]), (file, name)


@pytest.mark.parametrize("part", FORBIDDEN)
def test_nobody_imports_what_is_not_theirs(part: str) -> None:
    for file in _files(part):
        assert not {name.partition(".")[0] for name in _imports(file)} & FORBIDDEN[part], file


def test_the_server_runs_without_torch_in_its_process() -> None:
    code = "import sys, tinsmith.cli, tinsmith.engine.process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
