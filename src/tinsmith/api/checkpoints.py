"""Training runs and checkpoints, as they are looked at and looked after."""

from __future__ import annotations

from starlette.responses import Response

from tinsmith.service.catalog import Checkpoint, RunView
from tinsmith.wire.checkpoint_search import CheckpointSearch
from tinsmith.wire.optimizers import config_of
from tinsmith.wire.paths import TinkerPath
from tinsmith.wire.requests import HOUR, TEN_YEARS, CopyWeights
from tinsmith.wire.urns import user_urn

from .http import Call, iso_time, json_response
from .sessions import _texts


async def list_runs(call: Call) -> Response:
    limit, offset = call.page()
    project = call.request.query_params.get("project_id")
    views, total = await call.service.catalog.list_runs(
        call.caller, limit, offset, own=call.owned, project=project
    )
    return json_response(
        {
            "training_runs": [_run(view) for view in views],
            "cursor": {"offset": offset, "limit": limit, "total_count": total},
        }
    )


async def get_run(call: Call) -> Response:
    view = await call.service.catalog.run(call.caller, call.path("run_id"))
    return json_response(_run(view))


async def list_of_run(call: Call) -> Response:
    rows = await call.service.catalog.checkpoints_of_run(call.caller, call.path("run_id"))
    return json_response({"checkpoints": [_checkpoint(row) for row in rows], "cursor": None})


async def list_all(call: Call) -> Response:
    limit, offset = call.page(limit=100)
    rows, total = await call.service.catalog.list_checkpoints(call.caller, limit, offset)
    return json_response(
        {
            "checkpoints": [_checkpoint(row) for row in rows],
            "cursor": {"offset": offset, "limit": limit, "total_count": total},
        }
    )


async def search(call: Call) -> Response:
    wanted = CheckpointSearch.read(await call.fields())
    found, more = await call.service.catalog.search_checkpoints(call.caller, wanted)
    cursor: dict[str, str] | None = None
    if more:
        last = found[-1].row
        cursor = {"last_created_at": iso_time(last.created_at), "last_checkpoint_uuid": last.id}
    answers = [{**_checkpoint(each.row), "base_model": each.base_model} for each in found]
    return json_response({"checkpoints": answers, "next_cursor": cursor})


async def delete(call: Call) -> Response:
    await call.service.catalog.delete_checkpoint(call.caller, _path(call))
    return json_response({})


async def publish(call: Call) -> Response:
    await call.service.catalog.publish(call.caller, _path(call), True)
    return json_response({})


async def unpublish(call: Call) -> Response:
    checkpoint_id = f"{call.path('kind')}/{call.path('name')}"
    path = TinkerPath.from_checkpoint_id(call.path("run_id"), checkpoint_id)
    await call.service.catalog.publish(call.caller, path, False)
    return json_response({})


async def copy(call: Call) -> Response:
    request = CopyWeights.read(await call.fields())
    headers = call.request.headers
    token = headers.get("x-tinker-weights-access-token") or request.weights_access_token
    path = await call.service.copies.copy(call.caller, request, token, headers.get("x-idempotency-key"))
    return json_response({"tinker_path": str(path)})


async def set_ttl(call: Call) -> Response:
    ttl = (await call.fields()).optional_integer("ttl_seconds", least=HOUR, most=TEN_YEARS)
    await call.service.catalog.set_ttl(call.caller, _path(call), ttl)
    return json_response({})


async def weights_info(call: Call) -> Response:
    path = TinkerPath.parse((await call.fields()).text("tinker_path", longest=2048), "tinker_path")
    _, source = await call.service.catalog.checkpoint(call.caller, path)
    return json_response(
        {
            "base_model": source.base_model,
            "optimizer_config": config_of(source.optimizer),
            "is_lora": True,
            "lora_rank": source.lora.get("rank"),
            "train_unembed": source.lora.get("train_unembed"),
            "train_mlp": source.lora.get("train_mlp"),
            "train_attn": source.lora.get("train_attn"),
        }
    )


def _path(call: Call) -> TinkerPath:
    return TinkerPath.from_checkpoint_id(call.path("run_id"), call.path("checkpoint_id"))


def _run(view: RunView) -> dict[str, object]:
    row = view.row
    return {
        "training_run_id": row.id,
        "base_model": row.base_model,
        "model_owner": user_urn(row.user_id),
        "is_lora": True,
        "corrupted": view.lost,
        "lora_rank": row.lora.get("rank"),
        "last_request_time": iso_time(view.last_request_at),
        "last_checkpoint": _checkpoint(view.newest) if view.newest is not None else None,
        "last_sampler_checkpoint": _checkpoint(view.newest_sampler) if view.newest_sampler else None,
        "user_metadata": _texts(row.user_metadata),
    }


def _checkpoint(row: Checkpoint) -> dict[str, object]:
    return {
        "checkpoint_id": row.path.checkpoint_id,
        "checkpoint_type": row.kind,
        "time": iso_time(row.created_at),
        "tinker_path": str(row.path),
        "size_bytes": row.size_bytes,
        "public": row.published_at is not None,
        "user_metadata": row.user_metadata,
        "expires_at": iso_time(row.expires_at) if row.expires_at is not None else None,
    }
