"""The OpenAPI document: the routes, with what operations.py says of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinsmith import __version__

from .door_operations import DOORS
from .http import PROTOBUF
from .operations import OPERATIONS
from .records import CHECKPOINT_NAME
from .schemas import Operation, Schema, name_of, one_of, text

ROOT = "/api/v1/"
DOOR = "/v1/"  # the doors have other addresses, too
_KNOWN = OPERATIONS | DOORS

_STATUSES = {
    302: "It is where `Location` says, until `Expires`",
    400: "Something is wrong with the request; `detail` names it and says what would be right",
    401: "No valid key",
    402: "A budget is used up",
    403: "The key's user may not do this",
    404: "There is no such thing, or it is somebody else's, which looks the same",
    408: "Not yet; ask again",
    409: "It does not go with what is there",
    410: "It existed, and will not come back",
    413: "The body is longer than this server takes",
    429: "A limit is reached; `Retry-After` says when to try again",
    503: "Not now: the server is starting or stopping",
}
_OF_EVERY_KEY = (400, 401, 403, 404, 429, 503)

_PATH_PARAMETERS: dict[str, Schema] = {
    "session_id": name_of("session"),
    "run_id": name_of("run"),
    "sampler_id": name_of("sampler"),
    "kind": one_of("weights", "sampler_weights", "external_weights"),
    "name": {"type": "string", "minLength": 1, "maxLength": 256, "pattern": CHECKPOINT_NAME},
    "checkpoint_id": name_of("checkpoint"),
    "model": name_of("weights"),
    "file": text(),
    "upload_id": name_of("upload"),
}


_UNDESCRIBED = Operation("Not described yet", "other", body={"type": "object"}, statuses=(402, 409, 410))
_BINARY: Schema = {"type": "string", "format": "binary"}


def path_of(route: Route) -> str:
    """A route's path below the root, or a door's whole, as the document has it: a checkpoint's id in its two
    parts."""
    path = route.path.removeprefix(ROOT).replace("{checkpoint_id:path}", "{kind}/{name}")
    return re.sub(":(path|anything)}", "}", path)


def make_document(routes: Iterable[Route], root_path: str = "") -> dict[str, Any]:
    """A route that operations.py does not know yet is in it with its path alone; a test wants them all."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        if not route.path.startswith((ROOT, DOOR)):
            continue  # the same again, elsewhere
        for method in sorted((route.methods or set()) - {"HEAD"}):
            path = path_of(route)
            whole = path if path.startswith("/") else ROOT + path
            paths.setdefault(whole, {})[method.lower()] = _operation(
                path, _KNOWN.get((method, path), _UNDESCRIBED)
            )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tinsmith",
            "version": __version__,
            "description": "Tinker's API. What is wrong with the content of a training request is told by its"
            " future: 200 with `error` and `category` from `retrieve_future`.",
        },
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            }
        },
    }


def _operation(path: str, about: Operation) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{about.summary} {path}").strip("_").lower()[:120],
        "summary": about.summary,
        "tags": [about.tag],
        "security": [{"key": []}, {"bearer": []}] if about.key else [],
        "parameters": [
            *(_parameter("path", name, _PATH_PARAMETERS[name]) for name in re.findall(r"\{(\w+)\}", path)),
            *(
                _parameter("query", name, schema, required=name in about.required_query)
                for name, schema in about.query.items()
            ),
        ],
        "responses": {} if 302 in about.statuses else {"200": _answer(about)},
    }
    if about.body is not None:
        content: dict[str, Any] = {"application/json": {"schema": about.body}}
        if about.protobuf_body is not None:
            content[PROTOBUF] = {"schema": {**_BINARY, "description": about.protobuf_body}}
        found["requestBody"] = {"content": content, "required": bool(about.body.get("required", True))}
    if about.binary_body:
        found["requestBody"] = {"content": {"application/octet-stream": {"schema": _BINARY}}}
    general = _OF_EVERY_KEY if about.key else (400, 503)
    for status in sorted({*general, *about.statuses}):
        if status == 302:
            found["responses"]["302"] = {"description": _STATUSES[302]}
            continue
        schema = about.error if status != 408 else {"type": "object"}
        found["responses"][str(status)] = {
            "description": _STATUSES[status],
            "content": {"application/json": {"schema": schema}},
        }
    return found


def _parameter(where: str, name: str, schema: Schema, *, required: bool = True) -> dict[str, Any]:
    return {"in": where, "name": name, "required": required, "schema": schema}


def _answer(about: Operation) -> dict[str, Any]:
    if about.files:
        content: dict[str, Any] = {
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
        }
    else:
        content = {"application/json": {"schema": about.answer}}
        if about.protobuf_answer is not None:
            content[PROTOBUF] = {"schema": {**_BINARY, "description": about.protobuf_answer}}
        if about.events:
            # No type: some readers of OpenAPI hold a schema here against each event, others against the text.
            content["text/event-stream"] = {"schema": {"description": "Server-sent events"}}
    return {"description": "Done", "content": content}


def encode_document(routes: Iterable[Route], root_path: str) -> bytes:
    return json.dumps(make_document(routes, root_path), separators=(",", ":")).encode()


async def document(request: Request) -> Response:
    """For everybody: it says nothing that the source does not say."""
    return Response(request.app.state.openapi, media_type="application/json")
