"""Client sessions."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from tinsmith.service.service import Service
from tinsmith.service.sessions import FoundSession
from tinsmith.wire.requests import CreateSession, FinishSession
from tinsmith.wire.session_search import SessionSearch
from tinsmith.wire.urns import user_urn

from .http import Call, iso_time, json_response, root_of


async def create(call: Call) -> Response:
    session_id = await call.service.sessions.create(call.caller, CreateSession.read(await call.fields()))
    return json_response(
        {
            "type": "create_session",
            "session_id": session_id,
            "info_message": None,
            "warning_message": None,
            "error_message": None,
        }
    )


async def heartbeat(call: Call) -> Response:
    session_id = (await call.fields()).text("session_id")
    await call.service.sessions.heard_of(call.caller, session_id)
    return json_response({"type": "session_heartbeat"})


async def finish(call: Call) -> Response:
    # A program that has ended must not fail for the text of its own exception.
    request = FinishSession.read(await call.fields(halves=True))
    await call.service.sessions.finish(call.caller, call.path("session_id"), request)
    return json_response({})


async def get(call: Call) -> Response:
    row, runs, samplers = await call.service.sessions.members(call.caller, call.path("session_id"))
    return json_response(
        {
            "training_run_ids": runs,
            "sampler_ids": samplers,
            "user_metadata": _texts(row.user_metadata),
            "display_name": row.display_name,
            # What the SDK does not ask for, and other clients may:
            "project_id": row.project_id,
            "status": call.service.sessions.status(row),
        }
    )


async def list_(call: Call) -> Response:
    limit, offset = call.page()
    rows = await call.service.sessions.page(call.caller, limit, offset, own=call.owned)
    return json_response({"sessions": [row.id for row in rows]})


async def search(call: Call) -> Response:
    wanted = SessionSearch.read(await call.fields())
    found, more = await call.service.sessions.search(call.caller, wanted)
    cursor: dict[str, str] | None = None
    if more:
        last = found[-1].row
        cursor = {"last_created_at": iso_time(last.created_at), "last_session_id": last.id}
    return json_response({"sessions": [_summary(call, each) for each in found], "next_cursor": cursor})


async def move(call: Call) -> Response:
    project = (await call.fields()).text("project_id")
    await call.service.sessions.move(call.caller, call.path("session_id"), project)
    return json_response({})


def _summary(call: Call, found: FoundSession) -> dict[str, object]:
    row = found.row
    return {
        "session_id": row.id,
        "created_at": iso_time(row.created_at),
        "owner": user_urn(row.user_id),
        "project_id": row.project_id,
        "status": call.service.sessions.status(row),
        "checkpoints_count": found.checkpoints,
        "checkpoint_storage_bytes": found.checkpoint_bytes,
        "display_name": row.display_name,
        "user_metadata": row.texts,
    }


async def export_trace(call: Call) -> Response:
    """A Perfetto trace of the session's requests. The SDK asks until it is ready."""
    address = await call.service.timelines.export(call.caller, call.path("session_id"))
    if address is None:
        return json_response({"status": "pending"})
    return json_response(
        {"status": "ready", "url": f"{root_of(call.request, call.service)}/api/v1/{address}"}
    )


async def download_trace(request: Request, service: Service) -> Response:
    query = request.query_params
    name = request.path_params["name"]
    path = service.timelines.file(name, query.get("expires", ""), query.get("signature", ""))
    return FileResponse(path, media_type="application/octet-stream", filename=name)


def _texts(metadata: dict[str, object] | None) -> dict[str, str] | None:
    """Metadata as answers may carry it: texts alone."""
    if metadata is None:
        return None
    return {key: value if isinstance(value, str) else str(value) for key, value in metadata.items()}
