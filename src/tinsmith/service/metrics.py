"""Figures for Prometheus. Labels say what was done, never by whom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

# Of the engine's figures: bytes, and lengths of queues.
_BYTES = (
    "adapter_bytes", "adapter_budget_bytes", "cache_used_bytes", "cache_budget_bytes", "model_bytes",
)  # fmt: skip
_HISTOGRAMS = {
    "train_pass_seconds": "Seconds of a training pass",
    "sample_step_seconds": "Seconds of a sampling step",
    "optim_step_seconds": "Seconds of an optimizer step",
    "first_token_seconds": "Seconds from a sample's arrival at the engine to its first token",
    "train_pass_fill": "Part of a training pass's rows that was filled",
    "sample_step_fill": "Part of a sampling step's places that was filled",
}


class Metrics:
    """Counts HTTP requests as they come, and reads the rest off the service's status."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "tinsmith_http_requests",
            "HTTP requests, by route and status",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "tinsmith_http_request_seconds",
            "Seconds until an HTTP request was answered; results are waited for in retrieve_future",
            ("route",),
            buckets=SECONDS,
            registry=self._registry,
        )

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP request was answered. `route` is the pattern, so that there are not many of them."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self, status: Mapping[str, Any]) -> bytes:
        """Everything, in Prometheus' own format. `status` is Service.status()."""
        now = CollectorRegistry()
        now.register(_Status(status))
        return generate_latest(self._registry) + generate_latest(now)


class _Status(Collector):
    def __init__(self, status: Mapping[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status, engine = self._status, cast(Mapping[str, Any], self._status["engine"])
        yield _gauge("ready", "Whether work that comes now is done now", int(status["ready"]))
        yield _gauge("uptime_seconds", "Seconds since the server started", status["uptime_seconds"])
        yield _gauge("engine_generation", "How often an engine was started", status["generation"])
        runs = GaugeMetricFamily("tinsmith_runs", "Training runs by phase", labels=["phase"])
        for phase, count in status["runs"].items():
            runs.add_metric([phase], count)
        yield runs
        queues = GaugeMetricFamily("tinsmith_queue_depth", "Requests that wait or run", labels=["queue"])
        for name, count in status["queues"].items():
            queues.add_metric([name], count)
        yield queues
        yield _tokens("tokens", "Tokens that were metered", status["metered"])
        if not engine:
            return
        yield _tokens("engine_tokens", "Tokens that the engine computed, anew ones too", engine["tokens"])
        yield CounterMetricFamily(
            "tinsmith_sequences_put_off", "Sequences that had to make room", engine["put_off"]
        )
        prompt = engine["tokens"]["prefill"] + engine["tokens"]["cached_prefill"]
        hits = engine["tokens"]["cached_prefill"] / prompt if prompt else 0.0
        yield _gauge("cache_hit_ratio", "Part of all prompt tokens that the cache had", hits)
        memory = GaugeMetricFamily("tinsmith_engine_memory_bytes", "The engine's memory", labels=["part"])
        for name in _BYTES:
            memory.add_metric([name.removesuffix("_bytes")], engine[name])
        yield memory
        for name, about in _HISTOGRAMS.items():
            yield _histogram(f"tinsmith_{name}", about, engine["histograms"][name])


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"tinsmith_{name}", about, value)


def _tokens(name: str, about: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(f"tinsmith_{name}", about, labels=["kind"])
    for kind, count in counts.items():
        family.add_metric([kind], count)
    return family


def _histogram(name: str, about: str, figures: Mapping[str, Any]) -> Metric:
    buckets, so_far = [], 0
    bounds = [*(str(bound) for bound in figures["bounds"]), "+Inf"]
    for bound, count in zip(bounds, figures["counts"], strict=True):
        so_far += count
        buckets.append((bound, so_far))
    return HistogramMetricFamily(name, about, buckets=buckets, sum_value=figures["sum"])
