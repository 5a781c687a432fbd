"""OpenTelemetry: a span for every HTTP request, and for every training request and sample one with what it
went through (upload, queue, run, wait, download), sent to a collector. Needs the extra `otel`."""

from __future__ import annotations

from typing import Any

from tinsmith import __version__
from tinsmith.settings import SettingsError
from tinsmith.wire.timeline import Request

_OURS = "tinsmith"


class Tracing:
    """Everything that goes to one collector."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint` is the collector's OTLP/HTTP address, as http://localhost:4318. Raises SettingsError."""
        try:
            from opentelemetry import context, propagate, trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise SettingsError(
                "otlp_endpoint: traces need OpenTelemetry; install it with: pip install 'tinsmith[otel]'"
            ) from None
        self._context, self._propagate, self._trace = context, propagate, trace
        resource = Resource.create({"service.name": _OURS, "service.version": __version__})
        self._provider = TracerProvider(resource=resource)
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(_OURS, __version__)

    def begin(self, method: str, headers: dict[str, str]) -> HttpSpan:
        """A span that goes on where the caller's trace (its traceparent header) has come to."""
        parent = self._propagate.extract(headers)
        span = self._tracer.start_span(method, parent, kind=self._trace.SpanKind.SERVER)
        token = self._context.attach(self._trace.set_span_in_context(span, parent))
        return HttpSpan(self, span, method, token)

    def detach(self, token: Any) -> None:
        self._context.detach(token)

    def here(self) -> object:
        """Where the trace of what is being handled has come to."""
        return self._context.get_current()

    def final(self, request: Request, parent: Any) -> None:
        """A training request or sample has come to its end; `parent` is what `here` gave when it came."""
        end = request.end(request.ended or request.accepted)
        span = self._tracer.start_span(
            request.kind, parent, start_time=_ns(request.began), attributes=_attributes(request)
        )
        inner = self._trace.set_span_in_context(span, parent)
        for name, start, stop in request.phases(end):
            self._tracer.start_span(name, inner, start_time=_ns(start)).end(_ns(stop))
        if request.outcome != "done":
            span.set_status(self._trace.StatusCode.ERROR, request.outcome)
        span.end(_ns(end))

    def close(self) -> None:
        """Send what has not been sent yet."""
        self._provider.shutdown()


class HttpSpan:
    def __init__(self, tracing: Tracing, span: Any, method: str, token: Any) -> None:
        self._tracing, self._span, self._method, self._token = tracing, span, method, token

    def end(self, route: str, status: int) -> None:
        self._span.update_name(f"{self._method} {route}")
        self._span.set_attributes(
            {"http.request.method": self._method, "http.route": route, "http.response.status_code": status}
        )
        self._span.end()
        self._tracing.detach(self._token)


def _attributes(request: Request) -> dict[str, str | int]:
    named: dict[str, str | int] = {"tinsmith.request_id": request.request_id, "tinsmith.track": request.track}
    return {**named, **{f"tinsmith.tokens.{kind}": count for kind, count in request.usage.items()}}


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
