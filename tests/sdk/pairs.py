"""Every method and path that the installed SDK can send, read off its source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import tinker

_METHODS = {"get": "GET", "post": "POST", "put": "PUT", "delete": "DELETE", "patch": "PATCH"}
_PREFIX = "/api/v1/"


def all_pairs() -> set[tuple[str, str]]:
    """(method, path below /api/v1/), with {} where the path has a part of the request."""
    package = Path(tinker.__file__).parent
    found: set[tuple[str, str]] = set()
    for file in sorted(package.rglob("*.py")):
        if not file.name.endswith("_test.py"):
            found |= _pairs_of(ast.parse(file.read_text()))
    return found


def _pairs_of(tree: ast.AST) -> set[tuple[str, str]]:
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
            continue
        method = _METHODS.get(node.func.attr.lstrip("_"))
        where = node.args[0]
        if node.func.attr.endswith("request") and len(node.args) > 1 and isinstance(where, ast.Constant):
            method, where = str(where.value), node.args[1]
        path = _text(where)
        if method is not None and path is not None and path.startswith(_PREFIX):
            found.add((method, path.removeprefix(_PREFIX)))
    return found


def _text(node: ast.expr) -> str | None:
    """A text or an f-string, its holes as {}."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
    return None


def blank(path: str) -> str:
    """A route's path in the same form: without the names and types of its parameters."""
    return re.sub(r"\{[^}]*\}", "{}", path)
