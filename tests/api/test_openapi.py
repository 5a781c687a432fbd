"""The API's description of itself."""

from __future__ import annotations

from typing import Any

import httpx
import jsonschema_rs
import pytest
from starlette.routing import Route

from tests.harness import Server
from tinsmith.api import anthropic, models, openai
from tinsmith.api.app import _ROUTES
from tinsmith.api.door_operations import DOORS
from tinsmith.api.openapi import DOOR, ROOT, make_document, path_of
from tinsmith.api.operations import OPERATIONS

ROUTES = [*_ROUTES, *models.ROUTES, *openai.ROUTES, *anthropic.ROUTES]
DOCUMENT = make_document(ROUTES)


def test_it_is_served_to_everybody_at_both_addresses(server: Server) -> None:
    for path in ("/openapi.json", "/api/v1/openapi.json"):
        answer = httpx.get(f"{server.url}{path}")
        assert answer.status_code == 200
        assert answer.json() == DOCUMENT


def test_every_route_is_in_it_and_nothing_else() -> None:
    def methods(route: Route) -> set[str]:
        return (route.methods or set()) - {"HEAD"}

    told = [route for route in ROUTES if route.path.startswith((ROOT, DOOR))]
    assert {(method, path_of(r)) for r in told for method in methods(r)} == set(OPERATIONS | DOORS)


def test_its_schemas_are_schemas() -> None:
    for _, operation in _operations():
        contents = [operation.get("requestBody", {}), *operation["responses"].values()]
        for content in contents:
            for media in content.get("content", {}).values():
                jsonschema_rs.validator_for(media["schema"])


def test_every_operation_has_a_name_of_its_own_and_says_who_may() -> None:
    names = [operation["operationId"] for _, operation in _operations()]
    assert len(set(names)) == len(names)
    for label, operation in _operations():
        assert ("401" in operation["responses"]) == bool(operation["security"]), label


@pytest.mark.parametrize("path", ["/", "/below"])
def test_it_says_below_which_path_it_is_served(path: str) -> None:
    assert make_document(ROUTES, path)["servers"] == [{"url": path}]


def _operations() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{method} {path}", operation)
        for path, methods in DOCUMENT["paths"].items()
        for method, operation in methods.items()
    ]
