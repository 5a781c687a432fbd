"""What a client learns about the server before it does anything."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from tinsmith.service.errors import Forbidden, Unauthorized
from tinsmith.service.service import Service
from tinsmith.wire.telemetry import TelemetryBatch

from .http import Call, authenticate, error_response, json_response, service_error

# Every flag that some version of the SDK knows. What this server does not do is off.
CLIENT_CONFIG: dict[str, object] = {
    # Keys are exchanged for short-lived tokens, by which the SDK also knows who it is.
    "pjwt_auth_enabled": True,
    "credential_default_source": "api_key",
    "sample_dispatch_bytes_semaphore_size": 10 * 2**20,
    "inflight_response_bytes_semaphore_size": 50 * 2**20,
    "parallel_fwdbwd_chunks": True,
    "proto_compress_fwdbwd": True,
    "fwdbwd_max_chunk_len": 1024,
    "fwdbwd_max_chunk_bytes_count": 5_000_000,
    "fwdbwd_dispatch_bytes_semaphore_size": 50_000_000,
    "billing_exception_max_pause_duration_sec": 3600,
    "sample_no_retries": False,
    "sample_enable_stuck_detection": True,
    "sample_max_concurrent_requests": 2000,
    "use_pyqwest_transport": True,
    # Of SDKs before 0.31: passes as protobuf, forward among them, and runs from checkpoints in one call.
    "proto_write_fwdbwd": True,
    "fwd_via_fwdbwd": True,
    "create_model_via_load_weights": True,
    # Implemented, but a client that uses it never hears that a sample was lost in a restart.
    "sample_use_retrieve_futures": False,
    "custom_loss_server_side": True,
    "sample_join_sampling_session": True,
}

DYNAMIC_CONFIG: dict[str, object] = {
    "refresh_interval_sec": 300,
    "sample_cancel_enabled": True,
    "sample_cancel_max_batch_size": 64,
}


_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


async def healthz(request: Request) -> Response:
    """For those who watch over the server: no key, and 200 only when it can work."""
    service: Service = request.app.state.service
    if service.ready:
        return json_response({"status": "ok"})
    return error_response("stopping" if service.stopping else "starting", 503)


async def client_config(call: Call) -> Response:
    await call.body()
    return json_response(CLIENT_CONFIG)


async def dynamic_config(call: Call) -> Response:
    await call.body()
    return json_response(DYNAMIC_CONFIG)


async def capabilities(call: Call) -> Response:
    return json_response(
        {
            "supported_models": [
                {
                    "model_name": model.name,
                    "max_context_length": model.max_context,
                    "trainable": not model.not_trainable,
                    "sampleable": not model.not_sampleable,
                    # What the SDK does not ask for, and other clients may:
                    "why_not_trainable": model.not_trainable or None,
                    "why_not_sampleable": model.not_sampleable or None,
                    "images": model.images,
                    "why_no_images": model.no_images or None,
                    "architecture": model.architecture,
                    "parameters": model.parameters,
                    "dtype": model.dtype,
                    "max_rank": model.max_rank,
                    "exact": model.exact,
                    "path": model.way,
                }
                for model in call.service.context.engine.info.models.values()
            ]
        }
    )


async def telemetry(call: Call) -> Response:
    """Events that a client sends by itself. An exception's text may be anything that a text can be."""
    call.service.telemetry.take(call.caller.who, TelemetryBatch.read(await call.fields(halves=True)))
    return json_response({"status": "accepted"})


async def status(call: Call) -> Response:
    if not call.caller.admin:
        raise Forbidden("this needs an administrator's key (tinsmith keys create NAME --admin)")
    return json_response(await call.service.status())


async def metrics(request: Request) -> Response:
    """For Prometheus: with an administrator's key, or for everybody where the server was told so."""
    service: Service = request.app.state.service
    request.scope["tinsmith.route"] = "metrics"
    if not service.context.settings.open_metrics:
        try:
            caller = await authenticate(request)
        except Unauthorized as error:
            return service_error(error)
        if not caller.admin:
            return error_response("this needs an administrator's key, or --open-metrics", 403)
    return Response(service.metrics.text(await service.status(2.0)), media_type=_PROMETHEUS)
