"""The API's own OpenAPI document, turned against it: requests by its schemas, right and wrong ones, with
ids of one's own, of others, and of nobody."""

from __future__ import annotations


from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    positive_data_acceptance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.harness import MODEL, Raw, Server

MARK = "of-a-stranger-7f3a"  # in every text that another organization has written
POSSIBLE_REFUSALS = {400, 401, 402, 403, 404, 408, 410, 429}


@dataclass
class World:
    """What an organization has, by what it is."""

    raw: Raw
    ids: dict[str, list[str]] = field(default_factory=dict)


def make_world(server: Server, raw: Raw, mark: str) -> World:
    """A session, a run, checkpoints of every kind, a sampler, and requests; `mark` is in all their texts."""
    create = {
        "tags": [mark], "user_metadata": {"mark": mark}, "display_name": mark, "sdk_version": mark,
    }  # fmt: skip
    session = str(raw.ok("create_session", create)["session_id"])
    receipt = raw.ok(
        "create_model",
        {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": MODEL,
            "lora_config": {"rank": 4},
            "user_metadata": {"mark": mark},
        },
    )
    run = str(receipt["model_id"])
    raw.result(receipt["request_id"])
    paths, requests = [], [str(receipt["request_id"])]
    for seq_id, route in enumerate(("save_weights", "save_weights_for_sampler", "save_weights_external"), 1):
        body = {"model_id": run, "seq_id": seq_id, "path": mark, "user_metadata": {"mark": mark}}
        requests.append(str(raw.ok(route, body)["request_id"]))
        paths.append(str(raw.result(requests[-1])["path"]))
    sampling = {"session_id": session, "sampling_session_seq_id": 0, "model_path": paths[1]}
    sampler = str(raw.ok("create_sampling_session", sampling)["sampling_session_id"])
    sample = {
        "sampling_session_id": sampler,
        "seq_id": 0,
        "prompt": {"chunks": [{"tokens": [1, 2]}]},
        "sampling_params": {"max_tokens": 1},
    }
    requests.append(str(raw.ok("asample", sample)["request_id"]))
    raw.result(requests[-1])
    ids = {
        "session": [session],
        "run": [run],
        "sampler": [sampler],
        "request": requests,
        "path": paths,
        "model": [MODEL],
        "project": [mark],
    }
    return World(raw, ids)


@dataclass
class Problem:
    """An answer that should not have been."""

    operation: str
    why: str
    request: str
    answer: str

    def __str__(self) -> str:
        return f"{self.operation}: {self.why}\n  {self.request}\n  {self.answer}"


class Fuzzer:
    """Sends requests by the document, as one caller."""

    def __init__(self, server: Server, key: str, ids: dict[str, list[str]], examples: int) -> None:
        self._schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        self._document = self._schema.raw_schema
        self._key = key
        self._ids = ids
        self._examples = examples
        self.statuses: dict[str, set[int]] = {}

    def run(self, leave_out: set[str]) -> list[Problem]:
        problems: list[Problem] = []
        for result in self._schema.get_all_operations():
            operation = result.ok()
            if operation.label in leave_out:
                continue
            self.statuses[operation.label] = set()
            modes = [GenerationMode.POSITIVE]
            if operation.body or operation.query or operation.path_parameters:
                modes.append(GenerationMode.NEGATIVE)
            for mode in modes:
                problems += self._of(operation, mode)
        return problems

    def _of(self, operation: Any, mode: GenerationMode) -> list[Problem]:
        problems: list[Problem] = []

        @seed(20261124)
        @settings(
            max_examples=self._examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode), data=st.data())
        def one(case: Case, data: st.DataObject) -> None:
            self._name(case, operation, data)
            problem = self._send(case, operation.label, mode)
            if problem is not None and len(problems) < 3:
                problems.append(problem)

        one()
        return problems

    def _send(self, case: Case, label: str, mode: GenerationMode) -> Problem | None:
        case.headers = {**(case.headers or {}), "X-API-Key": self._key}
        answer = case.call(timeout=60)
        self.statuses[label].add(answer.status_code)
        checks = [
            not_a_server_error,
            status_code_conformance,
            content_type_conformance,
            response_schema_conformance,
        ]
        why = None
        try:
            case.validate_response(answer, checks=checks)
        except (Failure, FailureGroup) as failure:
            why = "; ".join(str(each.title) for each in getattr(failure, "exceptions", [failure]))
        if MARK.encode() in answer.content and MARK not in f"{case.body} {case.query} {case.formatted_path}":
            why = "another organization's data is in the answer"
        if why is None:
            return None
        return Problem(label, why[:500], case.as_curl_command()[:700], answer.content[:500].decode("utf-8", "replace"))

    # Ids

    def _name(self, case: Case, operation: Any, data: st.DataObject) -> None:
        """Put ids in their places: some of those that there are, some as they were made up."""
        described = self._document["paths"][operation.path][operation.method]
        for parameter in described["parameters"]:
            kind = parameter["schema"].get("x-names")
            where = case.path_parameters if parameter["in"] == "path" else case.query
            if kind is not None and where and parameter["name"] in where:
                self._maybe(where, parameter["name"], kind, data)
        content = described.get("requestBody", {}).get("content", {}).get("application/json")
        if content is not None and isinstance(case.body, dict):
            for container, name, kind in _named(content["schema"], case.body):
                self._maybe(container, name, kind, data)

    def _maybe(self, container: Any, name: str, kind: str, data: st.DataObject) -> None:
        pool = self._ids.get(kind, [])
        choice = data.draw(st.sampled_from([None, *pool, *pool])) if pool else None
        if choice is not None:
            container[name] = choice


def _named(schema: dict[str, Any], value: Any) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Where in a body ids are: the object, the field, and what the id names."""
    for branch in schema.get("anyOf", [schema]):
        if not isinstance(value, dict):
            continue
        for name, inner in branch.get("properties", {}).items():
            if name not in value:
                continue
            if "x-names" in inner:
                yield value, name, inner["x-names"]
            else:
                yield from _named(inner, value[name])


def latencies(raw: Raw, method: str, path: str, bodies: list[dict[str, Any] | None]) -> list[list[float]]:
    """How long answers take, alternating between the bodies, in seconds."""
    taken: list[list[float]] = [[] for _ in bodies]
    for _ in range(40):
        for index, body in enumerate(bodies):
            answer: httpx.Response = raw.http.request(method, path, json=body)
            taken[index].append(answer.elapsed.total_seconds())
    return taken
