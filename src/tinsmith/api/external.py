"""External weights and archives: signed URLs for files, and the files, out and in."""

from __future__ import annotations

import asyncio
import os
import stat
from email.utils import formatdate

from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse

from tinsmith.service.errors import NotFound, Refused
from tinsmith.service.external import Signed
from tinsmith.service.service import Service
from tinsmith.wire.paths import TinkerPath

from . import archive
from .http import Call, iso_time, json_response, root_of


async def urls(call: Call) -> Response:
    path = TinkerPath.from_checkpoint_id(call.path("run_id"), call.path("checkpoint_id"))
    signed = await call.service.external.urls(call.caller, path)
    return json_response(_signed(call, signed))


async def download(request: Request, service: Service) -> Response:
    """A file, or the part of it that a Range header names."""
    query = request.query_params
    path = await service.external.file(
        request.path_params["checkpoint_id"],
        request.path_params["file"],
        query.get("expires", ""),
        query.get("signature", ""),
    )
    try:
        found = await asyncio.to_thread(os.stat, path)
    except OSError:
        raise NotFound("these external weights are not there any more") from None
    if not stat.S_ISREG(found.st_mode):
        raise NotFound("there is no such file")
    return FileResponse(path, media_type="application/octet-stream", filename=path.name, stat_result=found)


async def archive_url(call: Call) -> Response:
    """A redirect, which SDKs before 0.34 do not follow but read."""
    path = TinkerPath.from_checkpoint_id(call.path("run_id"), call.path("checkpoint_id"))
    address, expires = await call.service.external.archive_url(call.caller, path)
    url = f"{root_of(call.request, call.service)}/api/v1/{address}"
    return Response(status_code=302, headers={"Location": url, "Expires": formatdate(expires, usegmt=True)})


async def download_archive(request: Request, service: Service) -> Response:
    """A tar of a checkpoint's adapter."""
    query = request.query_params
    files = await service.external.archived(
        request.path_params["checkpoint_id"], query.get("expires", ""), query.get("signature", "")
    )
    return StreamingResponse(
        archive.pieces(files),
        media_type="application/x-tar",
        headers={
            "Content-Length": str(archive.length([size for _, size, _ in files])),
            "Content-Disposition": 'attachment; filename="checkpoint.tar"',
        },
    )


async def start_upload(call: Call) -> Response:
    upload_id, signed = await call.service.uploads.start(call.caller, await call.fields())
    return json_response({"upload_id": upload_id, **_signed(call, signed)})


async def upload(request: Request, service: Service) -> Response:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused("Content-Encoding: send the file as it is")
    query = request.query_params
    await service.uploads.put(
        request.path_params["upload_id"],
        request.path_params["file"],
        query.get("expires", ""),
        query.get("signature", ""),
        request.stream(),
    )
    return json_response({})


async def finish_upload(call: Call) -> Response:
    path = await call.service.uploads.finish(call.caller, (await call.fields()).text("upload_id"))
    return json_response({"tinker_path": str(path)})


def _signed(call: Call, signed: Signed) -> dict[str, object]:
    root = root_of(call.request, call.service)
    urls = {name: f"{root}/api/v1/{address}" for name, address in signed.addresses.items()}
    return {"urls": urls, "expires": iso_time(signed.expires)}
