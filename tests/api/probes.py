"""For every route of the app, the requests that name something: whose it is, is for the test to say.

`PROBES` is by method and path. A route that takes no id of anything is in `NAMELESS`; a test holds both
against the app's own routes, so that a new one cannot be forgotten.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx

from tests.harness import MODEL, Raw, training_body
from tinsmith.wire import tinsmith_pb2 as pb

PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
ADAPTER: dict[str, Any] = {"base_model": MODEL, "lora_config": {"rank": 4, "seed": 1}}
_ONE = {"sampling_params": {"max_tokens": 1, "stop": []}}


@dataclass(frozen=True)
class Things:
    """What an organization has, by its ids. `name` is a checkpoint's."""

    session: str
    run: str
    sampler: str
    pass_: str  # a training request that is done
    sample: str
    loss: str
    name: str
    state: str
    weights: str
    external: str
    checkpoint: str  # the external one's id inside, which signed URLs have
    upload: str
    trace: str
    project: str
    project_name: str
    user: str
    key: str
    mark: str  # a text in names and metadata of everything

    def never(self) -> Things:
        """The same where there is nothing: each id another one of the same form and length."""
        others: dict[str, str] = {}

        def other(id_: re.Match[str]) -> str:
            new = uuid.uuid4()
            return others.setdefault(id_[0], str(new) if "-" in id_[0] else new.hex)

        def of(text: str) -> str:
            text = re.sub(r"[0-9a-f]{8}(-?)[0-9a-f]{4}\1[0-9a-f]{4}\1[0-9a-f]{4}\1[0-9a-f]{12}", other, text)
            return text.replace(self.mark, self.mark[::-1])

        assert self.mark != self.mark[::-1]
        changed = {f.name: of(getattr(self, f.name)) for f in fields(self)}
        changed["key"] = self.key[::-1]
        assert all(changed[f.name] != getattr(self, f.name) for f in fields(self)), changed
        return replace(self, **changed)

    def hide(self, text: str) -> str:
        """A text without these ids."""
        for f in sorted(fields(self), key=lambda f: -len(getattr(self, f.name))):
            text = text.replace(getattr(self, f.name), f"<{f.name}>")
        return text

    def found_in(self, text: str) -> list[str]:
        """Which of these a text tells."""
        return [f.name for f in fields(self) if getattr(self, f.name) in text]


def things_of(raw: Raw, mark: str, project: str | None = None) -> Things:
    """Make one of everything, in a project or in the default one."""
    create = {"tags": [mark], "user_metadata": {"mark": mark}, "display_name": mark, "sdk_version": "x"}
    session = str(raw.ok("create_session", {**create, "project_id": project})["session_id"])
    run = raw.run(session)
    state = str(raw.result(raw.save(run, 1, mark, user_metadata={"mark": mark}))["path"])
    paths = []
    for seq_id, route in ((2, "save_weights_for_sampler"), (3, "save_weights_external")):
        body = {"model_id": run, "seq_id": seq_id, "path": mark}
        paths.append(str(raw.result(raw.ok(route, body)["request_id"])["path"]))
    request = raw.forward_backward(run, 4)
    raw.result(request)
    sampling = {"session_id": session, "sampling_session_seq_id": 0, "model_path": paths[0]}
    sampler = str(raw.ok("create_sampling_session", sampling)["sampling_session_id"])
    sample = {"sampling_session_id": sampler, "seq_id": 0, "prompt": PROMPT, **_ONE}
    sampled = str(raw.ok("asample", sample)["request_id"])
    raw.result(sampled)
    below = f"training_runs/{run}/checkpoints/external_weights/{mark}/external_weights_urls"
    url = next(iter(raw.get(below).json()["urls"].values()))
    upload = raw.ok("external_weights_upload_start", {**ADAPTER, "destination_project_id": project})
    while (trace := raw.get(f"sessions/{session}/trace_export").json())["status"] == "pending":
        pass
    row = raw.post("sessions/search", {"session_id": session}).json()["sessions"][0]
    return Things(
        session=session,
        run=run,
        sampler=sampler,
        pass_=request,
        sample=sampled,
        loss=f"{session}:loss:0",
        name=mark,
        state=state,
        weights=paths[0],
        external=paths[1],
        checkpoint=url.split("external_weights/")[1].split("/")[0],
        upload=str(upload["upload_id"]),
        trace=trace["url"].split("traces/")[1].split("?")[0],
        project=str(row["project_id"]),
        project_name=project or mark,
        user=str(row["owner"]),
        key=str(raw.http.headers["X-API-Key"]),
        mark=mark,
    )


@dataclass
class Prober:
    """Asks as one caller, who has a session, a run and a sampler of its own."""

    raw: Raw
    session: str
    run: str
    sampler: str
    place: int = 0  # in the session: never the same twice
    seq_id: int = 0  # in the run: no gaps

    @classmethod
    def of(cls, raw: Raw) -> Prober:
        session = raw.session()
        sampling = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
        sampler = str(raw.ok("create_sampling_session", sampling)["sampling_session_id"])
        return cls(raw, session, raw.run(session), sampler)

    def next(self) -> int:
        self.place += 1
        return self.place

    def next_seq(self) -> int:
        self.seq_id += 1
        return self.seq_id

    def post(self, route: str, /, **body: object) -> httpx.Response:
        return self.raw.post(route, body)

    def outcome(self, answer: httpx.Response) -> httpx.Response:
        """What a submission's future says, where it was taken."""
        if answer.status_code != 200:
            return answer
        while (told := self.raw.retrieve(answer.json()["request_id"])).status_code == 408:
            pass
        return told


Probe = Callable[[Prober, Things], httpx.Response]


def _protobuf(zstd: bool) -> Probe:
    def ask(p: Prober, x: Things) -> httpx.Response:
        return p.raw.send_forward_backward(x.run, 10**6, zstd=zstd)

    return ask


def _with_loss(p: Prober, x: Things) -> httpx.Response:
    """A pass of one's own run by a loss that is named."""
    seq_id = p.next_seq()
    message = pb.ForwardBackwardRequest.FromString(training_body(p.run, seq_id, loss_fn="custom"))
    message.loss_fn_config_v2["loss_id"].text = x.loss
    return p.outcome(p.raw.send_forward_backward(p.run, seq_id, message.SerializeToString()))


def _json_pass(path: str, field: str) -> Probe:
    datum = {"model_input": PROMPT, "loss_fn_inputs": {"target_tokens": {"data": [2, 3], "dtype": "int64"}}}
    body = {"loss_fn": "cross_entropy", "data": [datum]}
    return _of_run(path, **{field: body})


def _of_run(route: str, **more: object) -> Probe:
    return lambda p, x: p.post(route, model_id=x.run, seq_id=10**6, **more)


def _future(kind: str) -> Probe:
    return lambda p, x: p.post("retrieve_future", request_id=getattr(x, kind), allow_metadata_only=True)


def _cancel(kind: str) -> Probe:
    return lambda p, x: p.post("cancel_future", request_id=getattr(x, kind))


def _load(kind: str, **more: object) -> Probe:
    """Into a run of one's own."""
    return lambda p, x: p.outcome(
        p.post("load_weights", model_id=p.run, seq_id=p.next_seq(), path=getattr(x, kind), **more)
    )


def _create_from(kind: str, **more: object) -> Probe:
    """As a new run of one's own session."""
    return lambda p, x: p.outcome(
        p.post("load_weights", session_id=p.session, model_seq_id=p.next(), path=getattr(x, kind), **more)
    )


def _sampler_of(kind: str, **more: object) -> Probe:
    return lambda p, x: p.post(
        "create_sampling_session",
        session_id=p.session,
        sampling_session_seq_id=p.next(),
        model_path=getattr(x, kind),
        **more,
    )


def _in_session(route: str, **more: object) -> Probe:
    return lambda p, x: p.post(route, session_id=x.session, **more)


def _below_run(method: str, rest: str = "", **more: Any) -> Probe:
    """Under a run's address; NAME in `rest` is the checkpoint's."""
    return lambda p, x: p.raw.http.request(
        method, f"training_runs/{x.run}{rest.replace('NAME', x.name)}", **more
    )


def _each_kind(method: str, rest: str, **more: Any) -> dict[str, Probe]:
    kinds = ("weights", "sampler_weights", "external_weights")
    return {kind: _below_run(method, f"/checkpoints/{kind}/NAME{rest}", **more) for kind in kinds}


def _get(path: str, **query: str) -> Probe:
    """`path` and the values of `query` name attributes of Things in braces."""
    return lambda p, x: p.raw.get(
        path.format(**asdict(x)), params={name: value.format(**asdict(x)) for name, value in query.items()}
    )


def _copy(**body: str) -> Probe:
    """OWN stands for a checkpoint of the prober's own."""

    def ask(p: Prober, x: Things) -> httpx.Response:
        filled = {name: value.format(**asdict(x)) for name, value in body.items()}
        if filled["source_path"] == "OWN":
            filled["source_path"] = str(
                p.raw.result(p.raw.save(p.run, p.next_seq(), f"own-{p.seq_id}"))["path"]
            )
        place = {"model_seq_id": p.next()} if "session_id" in filled else {}
        return p.post("copy_weights", **filled, **place)

    return ask


def _search(path: str, /, **narrow: Any) -> Probe:
    def filled(value: Any, x: Things) -> Any:
        if isinstance(value, dict):
            return {key: filled(inner, x) for key, inner in value.items()}
        if isinstance(value, list):
            return [filled(inner, x) for inner in value]
        return value.format(**asdict(x)) if isinstance(value, str) else value

    return lambda p, x: p.post(path, **{"owner": {"type": "accessible"}, **filled(narrow, x)})


def _door(path: str, model: str, /, **body: object) -> Probe:
    return lambda p, x: p.raw.http.post(
        str(p.raw.http.base_url.join(path)), json={"model": model.format(**asdict(x)), **body}
    )


def _doors(path: str, **body: object) -> dict[str, Probe]:
    named = {"a path": "{weights}", "a state": "{state}", "both": f"{MODEL};{{weights}}"}
    return {what: _door(path, model, **body) for what, model in named.items()}


def _door_model(model: str) -> Probe:
    return lambda p, x: p.raw.http.get(
        str(p.raw.http.base_url.join("/v1/models/")) + model.format(**asdict(x))
    )


_SIGNED = {"expires": "99999999999", "signature": "0" * 64}
_ADAM = {"adam_params": {"learning_rate": 0.0}}
_HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
_CURSOR = {"last_created_at": "2020-01-01T00:00:00Z"}

PROBES: dict[tuple[str, str], dict[str, Probe]] = {
    ("POST", "create_session"): {
        "by id": lambda p, x: p.post("create_session", tags=[], sdk_version="x", project_id=x.project),
        "by name": lambda p, x: p.post("create_session", tags=[], sdk_version="x", project_id=x.project_name),
    },
    ("POST", "session_heartbeat"): {"": _in_session("session_heartbeat")},
    ("POST", "telemetry"): {
        "": _in_session("telemetry", events=[], platform="Linux", sdk_version="x"),
    },
    ("POST", "sessions/search"): {
        "id": _search("sessions/search", session_id="{session}"),
        "name": _search("sessions/search", display_name="{mark}"),
        "metadata": _search("sessions/search", user_metadata={"mark": "{mark}"}),
        "project": _search("sessions/search", project_ids=["{project}"]),
        "owner": _search("sessions/search", owner={"type": "user", "owner_urns": ["{user}"]}),
        "cursor": _search("sessions/search", cursor={**_CURSOR, "last_session_id": "{session}"}),
    },
    ("GET", "sessions/{session_id}"): {"": _get("sessions/{session}")},
    ("PUT", "sessions/{session_id}/project"): {
        "session": lambda p, x: p.raw.http.put(
            f"sessions/{x.session}/project", json={"project_id": "Default"}
        ),
        "project": lambda p, x: p.raw.http.put(
            f"sessions/{p.session}/project", json={"project_id": x.project}
        ),
        "project's name": lambda p, x: p.raw.http.put(
            f"sessions/{p.session}/project", json={"project_id": x.project_name}
        ),
    },
    ("POST", "sessions/{session_id}/finish"): {
        "": lambda p, x: p.post(f"sessions/{x.session}/finish", reason={"type": "success"})
    },
    ("GET", "sessions/{session_id}/trace_export"): {"": _get("sessions/{session}/trace_export")},
    ("GET", "traces/{name}"): {
        "unsigned": _get("traces/{trace}"),
        "signed by nobody": _get("traces/{trace}", **_SIGNED),
    },
    ("POST", "create_model"): {"": _in_session("create_model", model_seq_id=77, **ADAPTER)},
    ("POST", "get_info"): {"": lambda p, x: p.post("get_info", model_id=x.run)},
    ("POST", "forward"): {"json": _json_pass("forward", "forward_input")},
    ("POST", "forward_backward"): {
        "protobuf": _protobuf(zstd=False),
        "protobuf in zstd": _protobuf(zstd=True),
        "json": _json_pass("forward_backward", "forward_backward_input"),
        "loss": _with_loss,
    },
    ("POST", "create_custom_loss"): {
        "": _in_session("create_custom_loss", custom_loss_seq_id=7, name="x", inputs=[], graph={})
    },
    ("POST", "optim_step"): {
        "right": _of_run("optim_step", **_ADAM),
        "wrong": _of_run("optim_step", adam_params={"learning_rate": "x"}),
    },
    ("POST", "save_weights"): {"": _of_run("save_weights", path="y")},
    ("POST", "save_weights_for_sampler"): {
        "named": _of_run("save_weights_for_sampler", path="y"),
        "unnamed": _of_run("save_weights_for_sampler", sampling_session_seq_id=10**6),
    },
    ("POST", "save_weights_external"): {"": _of_run("save_weights_external", path="y")},
    ("POST", "load_weights"): {
        "run": lambda p, x: p.post("load_weights", model_id=x.run, seq_id=10**6, path=x.state),
        "session": _in_session("load_weights", model_seq_id=88, path="tinker://x/weights/y"),
        "state": _load("state"),
        "state with its optimizer": _load("state", optimizer=True),
        "weights": _load("weights"),
        "external": _load("external"),
        "new from state": _create_from("state"),
        "new from state with its optimizer": _create_from("state", optimizer=True),
        "new from weights": _create_from("weights", base_model=MODEL),
    },
    ("POST", "create_sampling_session"): {
        "session": _in_session("create_sampling_session", sampling_session_seq_id=99, base_model=MODEL),
        "weights": _sampler_of("weights"),
        "state": _sampler_of("state"),
        "external": _sampler_of("external", base_model=MODEL),
    },
    ("POST", "join_sampling_session"): {
        "": lambda p, x: p.post("join_sampling_session", sampling_session_id=x.sampler)
    },
    ("GET", "samplers/{sampler_id}"): {"": _get("samplers/{sampler}")},
    ("POST", "asample"): {
        "sampler": lambda p, x: p.post(
            "asample", sampling_session_id=x.sampler, seq_id=p.next(), prompt=PROMPT, **_ONE
        ),
        "a request that was": lambda p, x: p.post(
            "asample", sampling_session_id=x.sampler, seq_id=0, prompt=PROMPT, **_ONE
        ),
        "weights": lambda p, x: p.post("asample", model_path=x.weights, prompt=PROMPT, **_ONE),
        "state": lambda p, x: p.post("asample", model_path=x.state, prompt=PROMPT, **_ONE),
    },
    ("POST", "retrieve_future"): {kind: _future(kind) for kind in ("pass_", "sample", "loss")},
    ("POST", "retrieve_futures"): {
        "sampler": lambda p, x: p.post(
            "retrieve_futures", target={"sampling_session_id": x.sampler}, timeout=0
        ),
        "requests": lambda p, x: p.post(
            "retrieve_futures",
            target={"sampling_session_id": p.sampler},
            timeout=0,
            retrieved_request_ids=[x.sample],
        ),
    },
    ("POST", "cancel_future"): {kind: _cancel(kind) for kind in ("pass_", "sample", "loss")},
    ("POST", "weights_info"): {
        kind: lambda p, x, kind=kind: p.post("weights_info", tinker_path=getattr(x, kind))  # type: ignore[misc]
        for kind in ("state", "weights", "external")
    },
    ("POST", "copy_weights"): {
        "source": _copy(source_path="{state}", destination_project_id="Default"),
        "source into a session": _copy(source_path="{weights}", session_id="{session}"),
        "project": _copy(source_path="OWN", destination_project_id="{project}"),
        "project's name": _copy(source_path="OWN", destination_project_id="{project_name}"),
        "session": _copy(source_path="OWN", session_id="{session}"),
    },
    ("GET", "training_runs"): {
        "by id": _get("training_runs", project_id="{project}"),
        "by name": _get("training_runs", project_id="{project_name}"),
    },
    ("GET", "training_runs/{run_id}"): {"": _below_run("GET")},
    ("GET", "training_runs/{run_id}/checkpoints"): {
        "": _below_run("GET", "/checkpoints"),
        "of its session": _get("training_runs/{session}/checkpoints"),
    },
    ("POST", "training_runs/{run_id}/checkpoints/{checkpoint_id:path}/publish"): _each_kind(
        "POST", "/publish"
    ),
    ("DELETE", "training_runs/{run_id}/checkpoints/{kind}/{name}/publish"): _each_kind("DELETE", "/publish"),
    ("PUT", "training_runs/{run_id}/checkpoints/{checkpoint_id:path}/ttl"): _each_kind(
        "PUT", "/ttl", json={"ttl_seconds": 7200}
    ),
    ("DELETE", "training_runs/{run_id}/checkpoints/{checkpoint_id:path}"): _each_kind("DELETE", ""),
    ("POST", "checkpoints/search"): {
        "metadata": _search("checkpoints/search", user_metadata={"mark": "{mark}"}),
        "project": _search("checkpoints/search", project_ids=["{project}"]),
        "owner": _search("checkpoints/search", owner={"type": "user", "owner_urns": ["{user}"]}),
        "cursor": _search("checkpoints/search", cursor={**_CURSOR, "last_checkpoint_uuid": "{checkpoint}"}),
    },
    ("GET", "training_runs/{run_id}/checkpoints/{checkpoint_id:path}/external_weights_urls"): _each_kind(
        "GET", "/external_weights_urls"
    ),
    ("GET", "training_runs/{run_id}/checkpoints/{checkpoint_id:path}/archive"): _each_kind("GET", "/archive"),
    ("GET", "checkpoint_archives/{checkpoint_id}"): {
        "unsigned": _get("checkpoint_archives/{checkpoint}"),
        "signed by nobody": _get("checkpoint_archives/{checkpoint}", **_SIGNED),
    },
    ("GET", "external_weights/{checkpoint_id}/{file}"): {
        "unsigned": _get("external_weights/{checkpoint}/adapter_config.json"),
        "signed by nobody": _get("external_weights/{checkpoint}/adapter_config.json", **_SIGNED),
    },
    ("POST", "external_weights_upload_start"): {
        "by id": lambda p, x: p.post(
            "external_weights_upload_start", **ADAPTER, destination_project_id=x.project
        ),
        "by name": lambda p, x: p.post(
            "external_weights_upload_start", **ADAPTER, destination_project_id=x.project_name
        ),
    },
    ("PUT", "external_weights_uploads/{upload_id}/{file}"): {
        "unsigned": lambda p, x: p.raw.http.put(
            f"external_weights_uploads/{x.upload}/adapter_config.json", content=b"{}"
        ),
        "signed by nobody": lambda p, x: p.raw.http.put(
            f"external_weights_uploads/{x.upload}/adapter_config.json", content=b"{}", params=_SIGNED
        ),
    },
    ("POST", "external_weights_upload_finish"): {
        "": lambda p, x: p.post("external_weights_upload_finish", upload_id=x.upload)
    },
    ("GET", "billing/usage/checkpoints/current"): {
        "project": _get("billing/usage/checkpoints/current", project_id="{project}")
    },
    # Other doors
    ("GET", "/v1/models/{model:anything}"): {
        "weights": _door_model("{weights}"),
        "state": _door_model("{state}"),
        "both": _door_model(f"{MODEL};{{weights}}"),
    },
    ("POST", "/v1/completions"): {
        **_doors("/v1/completions", prompt="hi", max_tokens=1),
        "streamed": _door("/v1/completions", "{weights}", prompt="hi", max_tokens=1, stream=True),
    },
    ("POST", "/v1/chat/completions"): _doors("/v1/chat/completions", **_HELLO),
    ("POST", "/v1/messages"): _doors("/v1/messages", **_HELLO),
    ("POST", "/v1/messages/count_tokens"): _doors("/v1/messages/count_tokens", messages=_HELLO["messages"]),
}  # fmt: skip

# What names nothing of anybody's: told are the caller's own things, or nobody's.
NAMELESS: dict[tuple[str, str], Callable[[Prober], httpx.Response]] = {
    ("GET", "/metrics"): lambda p: p.raw.http.get(str(p.raw.http.base_url.join("/metrics"))),
    ("GET", "/openapi.json"): lambda p: p.raw.http.get(str(p.raw.http.base_url.join("/openapi.json"))),
    ("GET", "openapi.json"): lambda p: p.raw.get("openapi.json"),
    ("GET", "healthz"): lambda p: p.raw.get("healthz"),
    ("POST", "client/config"): lambda p: p.post("client/config"),
    ("POST", "client/dynamic_config"): lambda p: p.post("client/dynamic_config"),
    ("GET", "get_server_capabilities"): lambda p: p.raw.get("get_server_capabilities"),
    ("GET", "status"): lambda p: p.raw.get("status"),
    ("POST", "auth/token"): lambda p: p.post("auth/token"),
    ("GET", "auth/apikey/me"): lambda p: p.raw.get("auth/apikey/me"),
    ("DELETE", "auth/apikey/me"): lambda p: p.raw.get("auth/apikey/me"),  # would end the caller
    ("GET", "audit"): lambda p: p.raw.get("audit"),
    ("GET", "sessions"): lambda p: p.raw.get("sessions", params={"limit": 1000}),
    ("GET", "checkpoints"): lambda p: p.raw.get("checkpoints", params={"limit": 1000}),
    ("GET", "billing/usage/events"): lambda p: p.raw.get("billing/usage/events", params=_this_hour()),
    ("GET", "/v1/models"): lambda p: p.raw.http.get(str(p.raw.http.base_url.join("/v1/models"))),
}  # fmt: skip


def _this_hour() -> dict[str, str]:
    begin = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    return {
        "starting_on": begin.isoformat(),
        "ending_before": (begin + timedelta(hours=1)).isoformat(),
    }
