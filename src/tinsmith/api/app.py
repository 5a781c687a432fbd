"""The routes, all in one place."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from tinsmith.service.errors import NotFound, ServiceError, Unauthorized
from tinsmith.service.service import Service

from . import (
    anthropic,
    audit,
    auth,
    billing,
    checkpoints,
    external,
    futures,
    models,
    openai,
    openapi,
    sampling,
    service_info,
    sessions,
    training,
)
from .doors import door_error
from .http import authenticate, error_response, route, service_error, signed_route
from .observe import Observe, Tracer

_ROUTES = [
    Route("/metrics", service_info.metrics, methods=["GET"]),
    Route("/api/v1/healthz", service_info.healthz, methods=["GET"]),
    Route("/api/v1/openapi.json", openapi.document, methods=["GET"]),
    Route("/openapi.json", openapi.document, methods=["GET"]),
    route("client/config", service_info.client_config, counted=False),
    route("client/dynamic_config", service_info.dynamic_config, counted=False),
    route("get_server_capabilities", service_info.capabilities, method="GET", counted=False),
    route("telemetry", service_info.telemetry, counted=False),
    route("status", service_info.status, method="GET", counted=False),
    # Identity
    route("auth/token", auth.token, counted=False),
    route("auth/apikey/me", auth.own_key, method="GET"),
    route("auth/apikey/me", auth.revoke_own_key, method="DELETE"),
    route("audit", audit.entries, method="GET", act="organization audit_read"),
    # Sessions
    route("create_session", sessions.create),
    route("session_heartbeat", sessions.heartbeat, counted=False),
    route("sessions", sessions.list_, method="GET"),
    route("sessions/search", sessions.search),
    route("sessions/{session_id}", sessions.get, method="GET"),
    route("sessions/{session_id}/project", sessions.move, method="PUT", act="session move"),
    route("sessions/{session_id}/finish", sessions.finish, counted=False),
    route("sessions/{session_id}/trace_export", sessions.export_trace, method="GET"),
    signed_route("traces/{name}", sessions.download_trace, method="GET"),
    # Training
    route("create_model", training.create_model, counted=False),
    route("get_info", training.get_info),
    route("forward", training.forward, counted=False),
    route("forward_backward", training.forward_backward, counted=False),
    route("create_custom_loss", training.create_custom_loss),
    route("optim_step", training.optim_step, counted=False),
    route("save_weights", training.save_weights, counted=False),
    route("save_weights_for_sampler", training.save_weights_for_sampler, counted=False),
    route("save_weights_external", training.save_weights_external, counted=False),
    route("load_weights", training.load_weights, counted=False),
    # Sampling
    route("create_sampling_session", sampling.create_session),
    route("join_sampling_session", sampling.join_session),
    route("samplers/{sampler_id}", sampling.get_sampler, method="GET"),
    route("asample", sampling.sample, counted=False),
    # Results
    route("retrieve_future", futures.retrieve, counted=False),
    route("retrieve_futures", futures.retrieve_many, counted=False),
    route("cancel_future", futures.cancel, counted=False),
    # Runs and checkpoints
    route("weights_info", checkpoints.weights_info),
    route("copy_weights", checkpoints.copy, act="checkpoint copy"),
    route("training_runs", checkpoints.list_runs, method="GET"),
    route("training_runs/{run_id}", checkpoints.get_run, method="GET"),
    route("training_runs/{run_id}/checkpoints", checkpoints.list_of_run, method="GET"),
    route(
        "training_runs/{run_id}/checkpoints/{checkpoint_id:path}/publish",
        checkpoints.publish,
        act="checkpoint publish",
    ),
    # In two parts, so that it is not taken for the deletion of a checkpoint that is called "publish".
    route(
        "training_runs/{run_id}/checkpoints/{kind}/{name}/publish",
        checkpoints.unpublish,
        method="DELETE",
        act="checkpoint unpublish",
    ),
    route(
        "training_runs/{run_id}/checkpoints/{checkpoint_id:path}/ttl",
        checkpoints.set_ttl,
        method="PUT",
        act="checkpoint ttl_set",
    ),
    route(
        "training_runs/{run_id}/checkpoints/{checkpoint_id:path}",
        checkpoints.delete,
        method="DELETE",
        act="checkpoint delete",
    ),
    route("checkpoints", checkpoints.list_all, method="GET"),
    route("checkpoints/search", checkpoints.search),
    route(
        "training_runs/{run_id}/checkpoints/{checkpoint_id:path}/external_weights_urls",
        external.urls,
        method="GET",
    ),
    route(
        "training_runs/{run_id}/checkpoints/{checkpoint_id:path}/archive", external.archive_url, method="GET"
    ),
    signed_route("checkpoint_archives/{checkpoint_id}", external.download_archive, method="GET"),
    # Billing
    route("billing/usage/events", billing.usage, method="GET"),
    route("billing/usage/checkpoints/current", billing.storage, method="GET"),
    signed_route("external_weights/{checkpoint_id}/{file}", external.download, method="GET"),
    route("external_weights_upload_start", external.start_upload),
    signed_route("external_weights_uploads/{upload_id}/{file}", external.upload, method="PUT"),
    route("external_weights_upload_finish", external.finish_upload),
]


async def _not_found(request: Request, _error: Exception) -> Response:
    """Even what there is not is told to callers with a key alone."""
    encode = models.words_for(request)
    wrong: ServiceError = NotFound(f"this server has no {request.method} {request.url.path}")
    try:
        await authenticate(request)
    except Unauthorized as error:
        wrong = error
    return service_error(wrong) if encode is None else door_error(wrong, encode)


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(error.detail, error.status_code)


def make_app(service: Service, root_path: str = "", tracer: Tracer | None = None) -> Starlette:
    """The ASGI application of one service, which the caller starts and stops. With a `root_path` it
    answers below that too, so that it does not matter whether the proxy in front strips it."""
    routes = [*_ROUTES, *models.ROUTES, *openai.ROUTES, *anthropic.ROUTES]
    below = [Mount(root_path, routes=routes)] if root_path.strip("/") else []
    app = Starlette(
        routes=[*routes, *below],
        exception_handlers={404: _not_found, 405: _not_found, HTTPException: _http_error},
        middleware=[Middleware(Observe, metrics=service.metrics, tracer=tracer)],
    )
    app.state.service = service
    app.state.openapi = openapi.encode_document(routes, root_path)
    return app
