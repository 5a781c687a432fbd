"""The list of base models, in the words of whoever asks: both clients ask at /v1/models."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinsmith.service.errors import Refused

from . import anthropic, openai
from .doors import HOSTED, Encode, door
from .http import Call, Endpoint, json_response

_EPOCH = "1970-01-01T00:00:00Z"  # what Anthropic says where a date is not known


async def _openai_list(call: Call) -> Response:
    data = [_openai_model(model.name) for model in call.service.completions.models()]
    return json_response({"object": "list", "data": data})


async def _openai_one(call: Call) -> Response:
    name = call.path("model")
    await call.service.completions.target(call.caller, name)
    return json_response(_openai_model(name))


def _openai_model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "tinsmith"}


async def _anthropic_list(call: Call) -> Response:
    query = call.request.query_params
    limit, _ = call.page()
    names = [model.name for model in call.service.completions.models()]
    lifecycles = query.getlist("lifecycle") + query.getlist("lifecycle[]")
    if lifecycles and "active" not in lifecycles:
        names = []
    for field in ("after_id", "before_id"):
        if (cursor := query.get(field)) is not None and cursor not in names:
            raise Refused(f"{field}: there is no model {cursor[:80]!r}")
    if (before := query.get("before_id")) is not None:
        right = names.index(before)
        left = max(0, right - limit)
        more = left > 0
    else:
        after = query.get("after_id")
        left = 0 if after is None else names.index(after) + 1
        right = left + limit
        more = right < len(names)
    shown = names[left:right]
    return json_response(
        {
            "data": [_anthropic_model(call, name) for name in shown],
            "has_more": more,
            "first_id": shown[0] if shown else None,
            "last_id": shown[-1] if shown else None,
        }
    )


async def _anthropic_one(call: Call) -> Response:
    name = call.path("model")
    target = await call.service.completions.target(call.caller, name)
    return json_response({**_anthropic_model(call, target.model.name), "id": name})


def _anthropic_model(call: Call, name: str) -> dict[str, object]:
    context = call.service.context.engine.info.models[name].max_context
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": _EPOCH,
        "lifecycle": "active",
        "max_input_tokens": context,
        "max_tokens": context,
    }


def words_for(request: Request) -> Encode | None:
    """How errors are told to whoever asks, by its header or by the address; None where that is no door's."""
    path = request.url.path
    if not re.search("/(oai|anthropic)/api/v1/|^/v1/", path):
        return None
    theirs = "anthropic-version" in request.headers or "/anthropic/api/v1/" in path
    return anthropic.encode_error if theirs else openai.encode_error


def _routes(path: str, of_openai: Endpoint, of_anthropic: Endpoint) -> list[Route]:
    """One endpoint at every address."""
    [one] = door(["/"], of_openai, openai.encode_error, method="GET", counted=True)
    [other] = door(["/"], of_anthropic, anthropic.encode_error, method="GET", counted=True)

    async def handle(request: Request) -> Response:
        asked = other if words_for(request) is anthropic.encode_error else one
        answer: Response = await asked.endpoint(request)
        return answer

    roots = [f"{hosted}/{client}/api/v1" for client in ("oai", "anthropic") for hosted in ("", HOSTED)]
    return [Route(f"{root}/{path}", handle, methods=["GET"]) for root in ["/v1", *roots]]


ROUTES = [
    *_routes("models", _openai_list, _anthropic_list),
    *_routes("models/{model:anything}", _openai_one, _anthropic_one),
]
