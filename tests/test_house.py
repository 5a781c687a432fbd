"""The house's one direction: nothing imports upwards, and no room carries what it must not know."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "tinsmith"

# What a room may import of the house beside itself, and what it must not import at all.
MAY = {
    "wire": set(),
    "blobs": set(),
    "text": set(),
    "store": {"wire"},
    "engine": {"wire", "logs"},
    "service": {"wire", "blobs", "text", "store", "engine.commands", "settings", "logs", "__version__"},
    "api": {"wire", "text", "service", "settings", "logs", "__version__"},
}
NEVER = {
    "wire": {"torch", "transformers", "sqlalchemy", "starlette", "pydantic", "tinker"},
    "blobs": {"torch", "sqlalchemy", "starlette"},
    "text": {"torch", "sqlalchemy", "starlette", "tinker"},
    "store": {"torch", "starlette", "tinker"},
    "engine": {"sqlalchemy", "alembic", "starlette", "uvicorn", "tinker", "peft"},
    "service": {"torch", "transformers", "sqlalchemy", "starlette", "uvicorn", "tinker"},
    "api": {"torch", "transformers", "sqlalchemy", "tinker"},
}


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("room", MAY)
def test_a_room_imports_downwards_alone(room: str) -> None:
    for file in sorted((SOURCE / room).rglob("*.py")):
        for name in imports(file):
            assert name.partition(".")[0] not in NEVER[room], f"{file} imports {name}"
            if not name.startswith("tinsmith."):
                continue
            own = name.removeprefix("tinsmith.")
            allowed = [room, *MAY[room]]
            # `from tinsmith.engine import commands` names the package first and the module then.
            assert any(own == a or own.startswith(f"{a}.") or a.startswith(f"{own}.") for a in allowed), (
                f"{file} imports {name}"
            )


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("tinsmith.wire.training", ["torch", "sqlalchemy", "starlette"]),
        ("tinsmith.engine.commands", ["torch", "numpy", "sqlalchemy", "starlette"]),
        ("tinsmith.engine.process", ["torch", "transformers", "sqlalchemy", "starlette"]),
        ("tinsmith.service.service", ["torch", "transformers", "starlette"]),
        ("tinsmith.api.app", ["torch", "transformers"]),
        ("tinsmith.engine.engine", ["sqlalchemy", "starlette", "uvicorn", "tinker"]),
    ],
)
def test_what_an_import_brings_along(module: str, absent: list[str]) -> None:
    code = f"import {module}, sys; print(*[m for m in {absent!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == []
