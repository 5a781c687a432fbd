"""The API's own OpenAPI document, turned against it: requests by its schemas, right and wrong ones, with
ids of one's own, of others, and of nobody."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.harness import MODEL, Raw, Server

_CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

# What ends things: only ever tried on what belongs to somebody else, or to nobody.
_ENDS = {
    "POST /api/v1/sessions/{session_id}/finish",
    "DELETE /api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}",
}
# What a caller does to its own key: it would be out.
_LEFT_OUT = {"DELETE /api/v1/auth/apikey/me"}

Ids = dict[str, list[str]]


def make_world(raw: Raw, mark: str, project: str | None = None) -> Ids:
    """A session, a run, checkpoints of every kind, a sampler and requests, by what they are; `mark` is in all
    their texts."""
    create = {"tags": [mark], "user_metadata": {"mark": mark}, "display_name": mark, "project_id": project}
    session = str(raw.ok("create_session", create)["session_id"])
    adapter = {"model_seq_id": 0, "base_model": MODEL, "lora_config": {"rank": 4}}
    receipt = raw.ok("create_model", {"session_id": session, **adapter, "user_metadata": {"mark": mark}})
    run = str(receipt["model_id"])
    requests, paths = [str(receipt["request_id"])], []
    saves = ("save_weights", "save_weights_for_sampler", "save_weights_external")
    for seq_id, route in enumerate(saves, 1):
        body = {"model_id": run, "seq_id": seq_id, "path": mark, "user_metadata": {"mark": mark}}
        requests.append(str(raw.ok(route, body)["request_id"]))
        paths.append(str(raw.result(requests[-1])["path"]))
    sampling = {"session_id": session, "sampling_session_seq_id": 0, "model_path": paths[1]}
    sampler = str(raw.ok("create_sampling_session", sampling)["sampling_session_id"])
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    sample = {"sampling_session_id": sampler, "seq_id": 0, "prompt": prompt}
    requests.append(str(raw.ok("asample", {**sample, "sampling_params": {"max_tokens": 1}})["request_id"]))
    raw.result(requests[-1])
    upload = raw.ok(
        "external_weights_upload_start",
        {"base_model": MODEL, "lora_config": {"rank": 4}, "destination_project_id": project},
    )
    return {
        "session": [session],
        "run": [run],
        "sampler": [sampler],
        "request": requests,
        "path": paths,
        "upload": [str(upload["upload_id"])],
        "model": [MODEL],
        "weights": [MODEL, paths[0], paths[1], f"{MODEL};{paths[1]}"],
        "project": [project] if project is not None else [],
    }


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
    """Sends requests by the document, as one caller. `mark` is in the texts of others."""

    def __init__(self, server: Server, key: str, own: Ids, others: Ids, mark: str) -> None:
        self._schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        self._document = self._schema.raw_schema
        self._key = key
        self._own = own
        self._others = others
        self._mark = mark
        self.statuses: dict[str, set[int]] = {}

    def run(self, examples: int) -> list[Problem]:
        """Try every operation with as many right requests, and as many wrong ones."""
        problems: list[Problem] = []
        for result in self._schema.get_all_operations():
            operation = result.ok()
            if operation.label in _LEFT_OUT:
                continue
            problems += self._try(operation, GenerationMode.POSITIVE, examples)
            if operation.body or operation.query or operation.path_parameters:
                problems += self._try(operation, GenerationMode.NEGATIVE, examples)
        return problems

    def _try(self, operation: Any, mode: GenerationMode, examples: int) -> list[Problem]:
        problems: list[Problem] = []

        @seed(20261124)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode), data=st.data())
        def one(case: Case, data: st.DataObject) -> None:
            self._put_ids(case, operation, data)
            problem = self._send(case, operation.label)
            if problem is not None and len(problems) < 3:
                problems.append(problem)

        one()
        return problems

    def _send(self, case: Case, label: str) -> Problem | None:
        case.headers = {**(case.headers or {}), "X-API-Key": self._key}
        answer = case.call(timeout=60)
        self.statuses.setdefault(label, set()).add(answer.status_code)
        why = None
        try:
            case.validate_response(answer, checks=_CHECKS)
        except (Failure, FailureGroup) as failure:
            found = failure.exceptions if isinstance(failure, FailureGroup) else [failure]
            why = "; ".join(str(each) for each in found)
        sent = f"{case.body} {case.query} {case.formatted_path}"
        if self._mark.encode() in answer.content and self._mark not in sent:
            why = "another organization's data is in the answer"
        says = b'"message"' if " /v1/" in label else b'"detail"'
        if answer.status_code >= 400 and says not in answer.content and answer.status_code != 408:
            why = "a refusal that does not say why"
        if why is None:
            return None
        shown = answer.content[:300].decode("utf-8", "replace")
        return Problem(label, why[:600], case.as_curl_command()[:600], f"{answer.status_code} {shown}")

    # Ids

    def _put_ids(self, case: Case, operation: Any, data: st.DataObject) -> None:
        """Put ids in their places: some of those that there are, some as they were made up."""
        described = self._document["paths"][operation.path][operation.method]
        for parameter in described["parameters"]:
            kind = parameter["schema"].get("x-names")
            where = case.path_parameters if parameter["in"] == "path" else case.query
            if kind is not None and where and parameter["name"] in where:
                self._maybe(where, parameter["name"], kind, operation.label, data)
        content = described.get("requestBody", {}).get("content", {}).get("application/json")
        if content is not None and isinstance(case.body, dict):
            for container, name, kind in places(content["schema"], case.body):
                self._maybe(container, name, kind, operation.label, data)

    def _maybe(self, container: Any, name: str, kind: str, label: str, data: st.DataObject) -> None:
        own = [] if label in _ENDS else self._own.get(kind, [])
        pool = [*own, *self._others.get(kind, [])]
        choice = data.draw(st.sampled_from([None, *pool, *pool])) if pool else None
        if choice is not None:
            container[name] = choice


def places(schema: dict[str, Any], value: Any) -> Iterator[tuple[dict[str, Any], str, str]]:
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
                yield from places(inner, value[name])
