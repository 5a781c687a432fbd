"""Sampling sessions and samples."""

from __future__ import annotations

from starlette.responses import Response

from tinsmith.wire.requests import CreateSamplingSession
from tinsmith.wire.sample_request import SampleRequest

from .http import Call, json_response


async def create_session(call: Call) -> Response:
    request = CreateSamplingSession.read(await call.fields())
    session_id = await call.service.samplers.create(call.caller, request)
    return json_response({"type": "create_sampling_session", "sampling_session_id": session_id})


async def join_session(call: Call) -> Response:
    id_ = (await call.fields()).text("sampling_session_id")
    clone = await call.service.samplers.join(call.caller, id_)
    return json_response({"type": "join_sampling_session", "client_counter": clone})


async def get_sampler(call: Call) -> Response:
    row = await call.service.samplers.get(call.caller, call.path("sampler_id"))
    return json_response({"sampler_id": row.id, "base_model": row.base_model, "model_path": row.model_path})


async def sample(call: Call) -> Response:
    promise = await call.service.sampling.sample(call.caller, SampleRequest.read(await call.fields()))
    return json_response(
        {"request_id": promise.request_id, "model_id": None, "sample_sequence_ids": promise.sequence_ids}
    )
