"""docs/api.md against the SDK's source, the server's routes and the tests that it names."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from starlette.routing import Match, Route

from tests.sdk.pairs import all_pairs, blank
from tinsmith.api.app import _ROUTES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text()
SDK_PAIRS = all_pairs()
ROW = re.compile(
    r"\| (?P<who>[^|]+) \| `(?P<method>[A-Z]+) (?P<path>[^`]+)` \|(?P<what>[^|]*)\| (?P<shown>[^|]+) \|"
)
ROWS = {(row["method"], row["path"]): row for row in ROW.finditer(PAGE)}


def is_served(method: str, path: str) -> bool:
    """Whether there is a route; a checkpoint's id has a slash in it."""
    filled = path.replace("checkpoints/{}", "checkpoints/weights/x").replace("{}", "x")
    scope = {"type": "http", "method": method, "path": f"/api/v1/{filled}"}
    return any(route.matches(scope)[0] is Match.FULL for route in _ROUTES)


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_sdks_pairs_are_all_in_the_table() -> None:
    assert len(SDK_PAIRS) >= 46
    assert set(ROWS) >= SDK_PAIRS


@pytest.mark.parametrize("pair", sorted(ROWS), ids=lambda pair: " ".join(pair))
def test_a_row_is_true(pair: tuple[str, str]) -> None:
    row = ROWS[pair]
    if row["shown"] == "not yet":
        assert not is_served(*pair), "there is a route, so say what it does and which test shows it"
        return
    assert is_served(*pair)
    assert row["what"].strip()
    file, _, name = row["shown"].strip("`").partition("::")
    assert name in names_in(file), f"{file} has no test {name}"


def test_every_route_is_in_the_table() -> None:
    routes = [route for route in _ROUTES if isinstance(route, Route) and route.path.startswith("/api/")]
    served = {(method, blank(r.path)) for r in routes for method in (r.methods or set()) - {"HEAD"}}
    # A checkpoint's id is one part of a path, or two.
    told = {(method, f"/api/v1/{path}") for method, path in ROWS}
    told |= {(method, path.replace("checkpoints/{}", "checkpoints/{}/{}")) for method, path in told}
    assert served <= told
