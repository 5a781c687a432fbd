"""What an operator sees: /metrics, logs with request ids, traces, and tinsmith status."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from tests.harness import KEY, MODEL, Server, wait_for
from tinsmith.cli.status import page


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes traces as an OpenTelemetry collector does."""

    spans: list[Any]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def spans() -> Iterator[tuple[str, list[Any]]]:
    Collector.spans = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Collector.spans
    server.shutdown()


@pytest.fixture(scope="module")
def server(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, spans: tuple[str, list[Any]]
) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("observed") / "data"
    made = Server(
        tiny_model, data, "--log-format", "json", "--log-level", "debug", "--otlp-endpoint", spans[0]
    )
    made.environment["OTEL_BSP_SCHEDULE_DELAY"] = "100"
    yield made.start()
    made.end()


def figures(server: Server) -> dict[tuple[str, ...], float]:
    """Every sample of /metrics, by its name and labels."""
    answer = httpx.get(f"{server.url}/metrics", headers={"X-API-Key": KEY})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def work(server: Server) -> str:
    """A pass and a sample; the training request's id."""
    raw = server.raw()
    session = raw.session()
    run = raw.run(session)
    request = raw.forward_backward(run, 1)
    assert "protobuf" in raw.result(request)
    raw.result(raw.optim(run, 2))
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
    sampler = raw.ok("create_sampling_session", body)["sampling_session_id"]
    sample = raw.ok(
        "asample",
        {
            "sampling_session_id": sampler,
            "seq_id": 1,
            "num_samples": 2,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(range(100))}]},
            "sampling_params": {"max_tokens": 5, "stop": [], "seed": 1},
        },
    )
    assert "protobuf" in raw.result(sample["request_id"])
    return request


def test_metrics_count_what_was_done(server: Server) -> None:
    before = figures(server)
    work(server)
    after = figures(server)

    def grown(*name: str) -> float:
        return after[name] - before.get(name, 0.0)

    for family in ("tinsmith_tokens_total", "tinsmith_engine_tokens_total"):
        assert grown(family, "kind=train") == 8
        assert grown(family, "kind=sample") == 10
        prompt = grown(family, "kind=prefill") + grown(family, "kind=cached_prefill")
        assert prompt == 100
    assert grown("tinsmith_train_pass_seconds_count") == 1
    assert grown("tinsmith_optim_step_seconds_count") == 1
    assert grown("tinsmith_first_token_seconds_count") == 1
    assert grown("tinsmith_sample_step_seconds_count") >= 5
    assert grown("tinsmith_sample_step_fill_count") >= 5
    everything = after["tinsmith_train_pass_seconds_bucket", "le=+Inf"]
    assert everything == after["tinsmith_train_pass_seconds_count",]
    assert grown("tinsmith_http_requests_total", "method=POST", "route=asample", "status=200") == 1
    assert grown("tinsmith_http_request_seconds_count", "route=asample") == 1
    kinds = {name[1] for name in after if name[0] == "tinsmith_tokens_total"}
    assert kinds == {f"kind={kind}" for kind in ("train", "prefill", "cached_prefill", "sample")}
    assert after["tinsmith_ready",] == 1
    assert 0 <= after["tinsmith_cache_hit_ratio",] <= 1
    assert after["tinsmith_queue_depth", "queue=samples"] == 0
    assert after["tinsmith_engine_memory_bytes", "part=model"] > 0


def test_metrics_are_for_administrators_and_name_nobody(server: Server) -> None:
    key = server.new_key("somebody-with-a-name")
    run = server.raw(key).run(server.raw(key).session())
    url = f"{server.url}/metrics"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"X-API-Key": key}).status_code == 403
    text = httpx.get(url, headers={"Authorization": f"Bearer {KEY}"}).text
    for secret in ("somebody-with-a-name", run, key, KEY):
        assert secret not in text


def test_a_path_that_does_not_exist_makes_no_new_route_in_the_metrics(server: Server) -> None:
    for number in range(3):
        assert server.raw().get(f"nothing/{number}").status_code == 404
    routes = {name[2] for name in figures(server) if name[0] == "tinsmith_http_requests_total"}
    assert not any("nothing" in route for route in routes)


def test_a_request_keeps_its_id_or_gets_one(server: Server) -> None:
    raw = server.raw()
    given = raw.get("sessions", headers={"X-Request-ID": "mine-17"})
    assert given.headers["X-Request-ID"] == "mine-17"
    for bad in ("two words", "x" * 200, "é"):
        made = raw.get("sessions", headers={"X-Request-ID": bad.encode()}).headers["X-Request-ID"]
        assert len(made) == 32
        assert made != bad
    assert raw.get("no/such/path").headers["X-Request-ID"]
    assert httpx.get(f"{server.url}/api/v1/sessions").headers["X-Request-ID"]


def test_every_line_of_the_log_is_json_with_the_requests_id(server: Server) -> None:
    server.raw().get("training_runs/none", headers={"X-Request-ID": "look-for-me"})

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]

    wait_for(lambda: any(line.get("request_id") == "look-for-me" for line in lines()), what="the line")
    (line,) = (each for each in lines() if each.get("request_id") == "look-for-me")
    assert (line["level"], line["logger"], line["process"]) == ("info", "tinsmith.api.requests", "server")
    assert (line["route"], line["status"], line["method"]) == ("training_runs/{run_id}", 404, "GET")
    assert line["seconds"] >= 0
    others = [text for text in server.log().splitlines() if not text.startswith("{")]
    assert others[0].startswith("tinsmith ")  # the banner, for whoever started it
    assert not [text for text in others[1:] if not text.startswith("  ")]


def test_traces_show_what_a_request_went_through(server: Server, spans: tuple[str, list[Any]]) -> None:
    _, got = spans
    request = work(server)

    def attribute(span: Any, name: str) -> str:
        return next((each.value.string_value for each in span.attributes if each.key == name), "")

    def found() -> Any:
        return next((each for each in got if attribute(each, "tinsmith.request_id") == request), None)

    wait_for(lambda: found() is not None, what="the trace")
    span = found()
    assert span.name == "forward_backward"
    children = {each.name: each for each in got if each.parent_span_id == span.span_id}
    assert {"queue", "run"} <= set(children)
    assert span.start_time_unix_nano <= children["queue"].start_time_unix_nano
    assert children["queue"].end_time_unix_nano == children["run"].start_time_unix_nano
    assert children["run"].end_time_unix_nano <= span.end_time_unix_nano
    wait_for(lambda: any(each.span_id == span.parent_span_id for each in got), what="the HTTP request's span")
    http_span = next(each for each in got if each.span_id == span.parent_span_id)
    assert http_span.name == "POST forward_backward"


def test_a_trace_goes_on_where_its_caller_is(server: Server, spans: tuple[str, list[Any]]) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    server.raw().get("sessions", headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
    wait_for(lambda: any(each.trace_id.hex() == trace for each in spans[1]), what="the span")


def status(server: Server, *words: str, key: str = KEY) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tinsmith", "status", "--url", server.url, "--key", key, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_status_on_a_terminal(server: Server) -> None:
    work(server)
    shown = status(server, "--once").stdout
    for part in ("ready", MODEL, "queues", "metered", "computed", "memory", "train_pass   ", " ms of "):
        assert part in shown
    told = json.loads(status(server, "--once", "--json").stdout)
    assert told["ready"] is True
    assert told["engine"]["tokens"]["train"] >= 8
    later = json.loads(json.dumps(told))
    later["uptime_seconds"] += 2
    later["engine"]["tokens"]["train"] += 1000
    assert "train 500" in page(later, told)
    narrow = page(later, told, 40).splitlines()
    assert max(map(len, narrow)) <= 40
    assert "          engine_commands 0" in narrow  # a figure stays beside its name


def test_status_waits_for_a_server_that_goes_away(server: Server) -> None:
    """What follows a server on a terminal follows it through its restarts."""
    answers = [server.raw().get("status").content, None]

    class Shy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if answer is None:
                self.connection.close()
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Shy) as shy:
        threading.Thread(target=shy.serve_forever, daemon=True).start()
        command = [sys.executable, "-m", "tinsmith", "status", "--url", f"http://127.0.0.1:{shy.server_port}"]
        following = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert following.stdout is not None
            assert following.stderr is not None
            assert "ready" in following.stdout.readline()
            assert "cannot be reached" in (said := following.stderr.readline())
            assert "tried again" in said
            assert following.poll() is None
        finally:
            following.kill()
            shy.shutdown()


def test_status_says_what_is_wrong(server: Server) -> None:
    refused = status(server, "--once", key="tml-nobody")
    assert refused.returncode == 2
    assert "answers 401" in refused.stderr
    plain = status(server, "--once", key=server.new_key("plain"))
    assert "administrator's key" in plain.stderr
    command = [sys.executable, "-m", "tinsmith", "status", "--once", "--url", "http://127.0.0.1:9"]
    away = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert away.returncode == 2
    assert "cannot be reached" in away.stderr
