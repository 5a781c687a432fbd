"""What the SDK would never send, or not this way: by raw HTTP. Every refusal has a JSON `detail`."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import zstandard

from tests.harness import KEY, MODEL, Raw, Server, detail, training_body, wait_for
from tinsmith.wire import tinsmith_pb2 as pb

LIMIT = 300_000


@pytest.fixture(scope="module")
def small_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a low limit for bodies and short polls."""
    data = tmp_path_factory.mktemp("small") / "data"
    server = Server(tiny_model, data, "--body-limit", str(LIMIT), "--poll-hold", "0.5")
    yield server.start()
    server.end()


@pytest.fixture(scope="module")
def small(small_server: Server) -> Raw:
    return small_server.raw()


@pytest.fixture
def run(raw: Raw) -> str:
    return raw.run(raw.session())


# Keys


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-Key": "tml-wrong"},
        {"X-API-Key": ""},
        {"Authorization": "Bearer tml-wrong"},
        {"Authorization": f"Basic {KEY}"},
    ],
)
def test_without_a_valid_key_every_route_but_healthz_is_a_401(
    server: Server, headers: dict[str, str]
) -> None:
    for method, path in (("POST", "create_session"), ("GET", "training_runs"), ("GET", "no/such/route")):
        answer = httpx.request(method, f"{server.url}/api/v1/{path}", headers=headers)
        assert (answer.status_code, "API key" in detail(answer)) == (401, True)
    assert httpx.get(f"{server.url}/api/v1/healthz", headers=headers).json() == {"status": "ok"}


def test_a_key_may_come_as_a_bearer_token(server: Server) -> None:
    answer = httpx.get(f"{server.url}/api/v1/training_runs", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200


def test_another_keys_objects_look_exactly_like_unknown_ones(server: Server, raw: Raw) -> None:
    session = raw.session()
    run = raw.run(session)
    request_id = raw.save(run, 1, "mine")
    path = raw.result(request_id)["path"]
    sampling = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
    sampler = raw.ok("create_sampling_session", sampling)["sampling_session_id"]
    other = server.raw(server.new_key("stranger"))

    def both(method: str, path: str, body: dict[str, object] | None, mine: str) -> None:
        """The stranger's answer about mine is the one about what never was."""
        never = "0" * len(mine)
        answers = []
        for name in (mine, never):
            filled = {k: v.replace("<>", name) if isinstance(v, str) else v for k, v in (body or {}).items()}
            answer = other.http.request(method, path.replace("<>", name), json=filled or None)
            answers.append((answer.status_code, answer.text.replace(name, "<>")))
        assert answers[0] == answers[1]
        assert answers[0][0] in (404, 410)

    both("POST", "optim_step", {"model_id": "<>", "seq_id": 2, "adam_params": {}}, run)
    both("POST", "get_info", {"model_id": "<>"}, run)
    both("POST", "save_weights", {"model_id": "<>", "seq_id": 2, "path": "x"}, run)
    both("GET", "training_runs/<>", None, run)
    both("GET", "training_runs/<>/checkpoints", None, run)
    both("DELETE", "training_runs/<>/checkpoints/weights/mine", None, run)
    both("POST", "session_heartbeat", {"session_id": "<>"}, session)
    both("POST", "sessions/<>/finish", {}, session)
    both("GET", "sessions/<>", None, session)
    both("GET", "samplers/<>", None, sampler)
    both("POST", "retrieve_future", {"request_id": "<>"}, request_id)
    both("POST", "weights_info", {"tinker_path": "tinker://<>/weights/mine"}, run)
    sample = {"prompt": {"chunks": [{"tokens": [1]}]}, "sampling_params": {"max_tokens": 1}, "seq_id": 0}
    both("POST", "asample", {**sample, "sampling_session_id": "<>"}, sampler)
    load = {"session_id": other.session(), "model_seq_id": 0, "path": path, "optimizer": False}
    assert "there is no checkpoint" in other.result(other.ok("load_weights", load)["request_id"])["error"]
    assert other.get("training_runs").json()["training_runs"] == []
    assert other.get("checkpoints").json()["checkpoints"] == []
    assert other.get("sessions").json()["sessions"] == [load["session_id"]]
    allowed = {**load, "model_seq_id": 1, "weights_access_token": KEY}
    assert "error" not in other.result(other.ok("load_weights", allowed)["request_id"])


def test_keys_of_one_organization_share_everything(server: Server) -> None:
    mine = server.raw(server.new_key("first", "--org", "team"))
    ours = server.raw(server.new_key("second", "--org", "team"))
    run = mine.run(mine.session())
    assert ours.get(f"training_runs/{run}").status_code == 200


def test_a_revoked_key_stops_working(server: Server) -> None:
    key = server.new_key("brief")
    raw = server.raw(key)
    raw.session()
    listing = [sys.executable, "-m", "tinsmith", "keys", "list", "--data", str(server.data)]
    assert key not in subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    revoke = [sys.executable, "-m", "tinsmith", "keys", "revoke", "brief", "--data", str(server.data)]
    subprocess.run(revoke, check=True, capture_output=True)
    wait_for(lambda: raw.get("training_runs").status_code == 401, 15.0, "the key to be refused")


def test_status_is_for_administrators(server: Server, raw: Raw) -> None:
    assert raw.get("status").json()["ready"] is True
    answer = server.raw(server.new_key("user")).get("status")
    assert (answer.status_code, "administrator" in detail(answer)) == (403, True)


# What there is not


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "nothing"), ("POST", "healthz"), ("GET", "optim_step"), ("POST", "backward")]
)
def test_an_unknown_route_is_a_404_with_a_detail(raw: Raw, method: str, path: str) -> None:
    answer = raw.http.request(method, path)
    assert (answer.status_code, path in detail(answer)) == (404, True)


def test_an_unknown_request_is_a_404_and_an_unknown_sample_a_410(raw: Raw) -> None:
    assert raw.retrieve("what:train:0:3").status_code == 404
    assert raw.retrieve("no-such-request").status_code == 404
    assert raw.retrieve("what:sample:0:3").status_code == 410


@pytest.mark.parametrize("path", ["optim_step", "save_weights", "save_weights_for_sampler", "load_weights"])
def test_an_unknown_run_is_a_404(raw: Raw, path: str) -> None:
    answer = raw.post(path, {"model_id": "no:train:0", "seq_id": 1})
    assert (answer.status_code, "no training run" in detail(answer)) == (404, True)
    assert raw.send_forward_backward("no:train:0", 1).status_code == 404


# Bodies


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_a_400(raw: Raw, body: bytes) -> None:
    answer = raw.http.post("optim_step", content=body)
    assert answer.status_code == 400
    assert detail(answer)


@pytest.mark.parametrize(
    ("field", "value"),
    [("model_id", None), ("model_id", 5), ("model_id", ""), ("seq_id", None), ("seq_id", 0), ("seq_id", "1"),
     ("seq_id", 1.5), ("seq_id", 2**63), ("seq_id", True)],
)  # fmt: skip
def test_a_request_that_does_not_say_whose_it_is_is_a_400_that_names_the_field(
    raw: Raw, run: str, field: str, value: object
) -> None:
    answer = raw.post("optim_step", {"model_id": run, "seq_id": 1, "adam_params": {}, field: value})
    assert (answer.status_code, detail(answer).startswith(field)) == (400, True)


def test_unknown_fields_are_ignored(raw: Raw, run: str) -> None:
    body = {"model_id": run, "seq_id": 1, "adam_params": {"new": 1}, "from_the_future": {"x": []}}
    assert "error" not in raw.result(raw.ok("optim_step", body)["request_id"])


@pytest.mark.parametrize(
    "body",
    [b"\xff" * 50, b"\x0a\xff", b"\x0a\x05abc", b"", b"\x10\x01", b"\x0a\x01a\x10\x00", b"\x0b", b"\x00\x00"],
)
@pytest.mark.parametrize("zstd", [True, False])
def test_a_malformed_training_body_is_a_400(raw: Raw, run: str, body: bytes, zstd: bool) -> None:
    answer = raw.send_forward_backward(run, 1, body, zstd=zstd)
    assert answer.status_code == 400
    assert detail(answer)
    assert "protobuf" in raw.result(raw.forward_backward(run, 1))


def test_garbage_within_a_training_body_fails_through_its_future(raw: Raw, run: str) -> None:
    body = training_body(run, 1) + b"\x1a\x04\xff\xff\xff\xff"
    failure = raw.result(raw.forward_backward(run, 1, body))
    assert failure["category"] == "user"
    assert "protobuf" in raw.result(raw.forward_backward(run, 2))


def test_broken_zstd_is_a_400(raw: Raw, run: str) -> None:
    whole = zstandard.ZstdCompressor().compress(training_body(run, 1, (200,)))
    for content in (b"no zstd at all", whole[: len(whole) // 2]):
        answer = raw.http.post("forward_backward", content=content, headers={"Content-Encoding": "zstd"})
        assert (answer.status_code, "zstd" in detail(answer)) == (400, True)


def test_another_encoding_is_a_400(raw: Raw) -> None:
    answer = raw.http.post("forward_backward", content=b"x", headers={"Content-Encoding": "br"})
    assert (answer.status_code, "zstd" in detail(answer)) == (400, True)


def test_json_may_be_compressed_too(raw: Raw) -> None:
    content = zstandard.ZstdCompressor().compress(b'{"tags": [], "sdk_version": "x"}')
    answer = raw.http.post("create_session", content=content, headers={"Content-Encoding": "zstd"})
    assert answer.status_code == 200


def test_a_zstd_bomb_costs_nothing(small: Raw) -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(2 * 10**9))
    started = time.monotonic()
    answer = small.http.post("forward_backward", content=bomb, headers={"Content-Encoding": "zstd"})
    assert answer.status_code == 400
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("zstd", [True, False])
def test_a_training_body_over_the_limit_fails_through_its_future_and_uses_up_its_place(
    small: Raw, zstd: bool
) -> None:
    run = small.run(small.session())
    body = training_body(run, 1, (500,) * 60)
    assert len(body) > LIMIT
    failure = small.result(small.forward_backward(run, 1, body, zstd=zstd))
    assert str(LIMIT) in failure["error"]
    assert failure["category"] == "user"
    assert "protobuf" in small.result(small.forward_backward(run, 2))


def test_a_json_body_over_the_limit_is_a_400(small: Raw) -> None:
    answer = small.post("create_session", {"tags": ["x" * LIMIT], "sdk_version": "x"})
    assert (answer.status_code, str(LIMIT) in detail(answer)) == (400, True)


# Content


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank": 0}, "lora_config.rank"),
        ({"rank": 10_000}, "lora_config.rank"),
        ({"rank": "8"}, "lora_config.rank"),
        ({"train_attn": False, "train_mlp": False, "train_unembed": False}, "all false"),
        ({"train_mlp": 1}, "lora_config.train_mlp"),
        ({"seed": 0.5}, "lora_config.seed"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused_through_the_future(
    raw: Raw, change: dict[str, object], says: str
) -> None:
    lora = {"rank": 4, **change}
    body = {"session_id": raw.session(), "model_seq_id": 0, "base_model": MODEL, "lora_config": lora}
    receipt = raw.ok("create_model", body)
    failure = raw.result(receipt["request_id"])
    assert failure["category"] == "user"
    assert says in failure["error"]
    assert "could not be created" in raw.result(raw.optim(receipt["model_id"], 1))["error"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.1", None, [], 10**400])
def test_a_learning_rate_that_is_none_is_refused(raw: Raw, run: str, value: object) -> None:
    import json

    body = json.dumps({"model_id": run, "seq_id": 1, "adam_params": {"learning_rate": value}})
    request_id = raw.http.post("optim_step", content=body).json()["request_id"]
    assert value is None or "learning_rate" in raw.result(request_id)["error"]


def test_a_step_without_parameters_is_refused(raw: Raw, run: str) -> None:
    failure = raw.result(raw.ok("optim_step", {"model_id": run, "seq_id": 1})["request_id"])
    assert "adam_params" in failure["error"]


@pytest.mark.parametrize(
    "path", ["", "weights/x", "tinker://a/weights", "tinker://a/b/c", "tinker://a/weights/b/c"]
)
def test_a_path_that_is_none_is_refused(raw: Raw, run: str, path: str) -> None:
    body = {"model_id": run, "seq_id": 1, "path": path, "optimizer": True}
    assert "path" in raw.result(raw.ok("load_weights", body)["request_id"])["error"]


SAMPLE: dict[str, object] = {
    "base_model": MODEL,
    "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
    "sampling_params": {"max_tokens": 2},
}


def test_a_sample_needs_no_session(raw: Raw) -> None:
    promise = raw.ok("asample", {**SAMPLE, "num_samples": 3})
    assert len(set(promise["sample_sequence_ids"])) == 3
    assert "protobuf" in raw.result(promise["request_id"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"base_model": None}, "base_model"),
        ({"base_model": "no/model"}, MODEL),
        ({"model_path": "tinker://no/weights/x"}, "model_path"),
        ({"model_path": "nonsense"}, "model_path"),
        ({"sampling_session_id": "none", "seq_id": 0}, "sampling_session_id"),
        ({"sampling_session_id": "none"}, "seq_id"),
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 10**9}, "num_samples"),
        ({"prompt": {"chunks": []}}, "prompt"),
        ({"prompt": {"chunks": [{"tokens": [-1]}]}}, "prompt.chunks[0].tokens"),
        ({"prompt": {"chunks": [{"tokens": [2**40]}]}}, "prompt.chunks[0].tokens"),
        ({"prompt": {"chunks": [{"tokens": [1.5]}]}}, "prompt.chunks[0].tokens"),
        ({"prompt": {"chunks": [{"tokens": ["a"]}]}}, "prompt.chunks[0].tokens"),
        ({"prompt": {"chunks": [{"tokens": [[1]]}]}}, "prompt.chunks[0].tokens"),
        ({"prompt": {"chunks": [{"type": "image", "data": ""}]}}, "prompt.chunks[0].type"),
        ({"prompt": {"chunks": [{"tokens": [1] * 512}]}}, "512"),
        ({"sampling_params": {"temperature": -1}}, "temperature"),
        ({"sampling_params": {"top_p": 0}}, "top_p"),
        ({"sampling_params": {"top_p": 1.5}}, "top_p"),
        ({"sampling_params": {"top_k": -2}}, "top_k"),
        ({"sampling_params": {"max_tokens": 0}}, "max_tokens"),
        ({"sampling_params": {"stop": [1, "a"]}}, "stop"),
        ({"sampling_params": {"stop": [""]}}, "stop"),
        ({"sampling_params": {"seed": "x"}}, "seed"),
        ({"record_stability_info": True}, "record_stability_info"),
        ({"prompt_alt_tokens_k": -1}, "prompt_alt_tokens_k"),
        ({"prompt_logprobs_last_n": 1}, "prompt_logprobs_last_n"),
        ({"prompt_logprobs_last_n": 9, "prompt_logprobs": True}, "prompt_logprobs_last_n"),
        ({"target_prompt_logprobs": [1]}, "target_prompt_logprobs"),
    ],
)
def test_a_sample_that_cannot_be_is_a_4xx_that_names_the_field(
    raw: Raw, change: dict[str, object], says: str
) -> None:
    answer = raw.post("asample", {**SAMPLE, **change})
    assert answer.status_code in (400, 404)
    assert says in detail(answer)


def test_a_token_that_the_model_does_not_know_fails_the_sample(raw: Raw) -> None:
    body = {**SAMPLE, "prompt": {"chunks": [{"tokens": [100_000]}]}}
    failure = raw.result(raw.ok("asample", body)["request_id"])
    assert failure["category"] == "user"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "mutable"}, "kind: must be 'snapshot' or 'inflight'"),
        ({"kind": "inflight", "path": "x"}, "path: does not go with kind 'inflight'"),
        ({"kind": "inflight", "ttl_seconds": 3600}, "ttl_seconds: does not go with kind 'inflight'"),
    ],
)
def test_a_sampler_save_that_cannot_be_names_the_field(
    raw: Raw, run: str, change: dict[str, object], says: str
) -> None:
    body = {"model_id": run, "seq_id": 1, "sampling_session_seq_id": 0, **change}
    assert says in raw.result(raw.ok("save_weights_for_sampler", body)["request_id"])["error"]


def test_a_context_suffix_of_a_models_name_is_understood(raw: Raw) -> None:
    promise = raw.ok("asample", {**SAMPLE, "base_model": f"{MODEL}:peft:512"})
    assert "protobuf" in raw.result(promise["request_id"])


@pytest.mark.parametrize(
    ("suffix", "says"),
    [
        (":peft:513", "asks for a context of 513 tokens; tests/tiny has 512"),
        (":peft:", "must be tests/tiny or tests/tiny:peft:TOKENS"),
        (":peft:-1", "must be"),
        (":peft:1e3", "must be"),
        (":peft:99999999999999999999", "must be"),
        (":full", "must be"),
        (":", "must be"),
    ],
)
def test_a_context_that_the_model_has_not_is_refused(raw: Raw, suffix: str, says: str) -> None:
    name = f"{MODEL}{suffix}"
    create = {"session_id": raw.session(), "model_seq_id": 0, "base_model": name, "lora_config": {"rank": 4}}
    for path, body in (("asample", {**SAMPLE, "base_model": name}), ("create_model", create)):
        answer = raw.post(path, body)
        assert answer.status_code == 400
        assert says in detail(answer)


# Waiting


def test_a_pending_result_is_held_and_then_a_408_that_says_why(small: Raw) -> None:
    run = small.run(small.session())
    waiting = small.optim(run, 2)
    started = time.monotonic()
    answer = small.retrieve(waiting)
    assert 0.4 < time.monotonic() - started < 3
    assert answer.status_code == 408
    assert answer.json()["type"] == "try_again"
    assert answer.json()["queue_state"] == "active"
    assert "seq_id 1" in answer.json()["queue_state_reason"]


def test_many_may_wait_for_one_result_and_are_woken_at_once(raw: Raw, run: str) -> None:
    waiting = raw.optim(run, 2)
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        futures = [pool.submit(raw.retrieve, waiting) for _ in range(20)]
        time.sleep(0.3)
        started = time.monotonic()
        raw.optim(run, 1)
        answers = [future.result() for future in futures]
    assert time.monotonic() - started < 5
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1


def test_results_are_protobuf_for_passes_and_samples_and_json_for_all_else(raw: Raw, run: str) -> None:
    passed = raw.retrieve(raw.forward_backward(run, 1))
    assert passed.headers["content-type"] == "application/x-protobuf"
    stepped = raw.retrieve(raw.optim(run, 2))
    assert stepped.headers["content-type"] == "application/json"


def test_an_old_clients_json_gets_the_same_numbers_as_protobuf(raw: Raw, run: str) -> None:
    """As SDKs before 0.27 ask, and as those before 0.19 read."""
    tokens = list(range(8))
    datum = {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": [t + 1 for t in tokens], "dtype": "int64", "shape": [8]},
            "weights": {"data": [1.0] * 8, "dtype": "float32", "shape": [8]},
        },
    }
    given = {"data": [datum], "loss_fn": "cross_entropy"}
    results = []
    for seq_id, (path, field) in enumerate(
        [("forward", "forward_input"), ("forward_backward", "forward_backward_input")], 1
    ):
        body = {"model_id": run, "seq_id": seq_id, field: given}
        body = {"request_id": raw.ok(path, body)["request_id"]}
        answer = raw.post("retrieve_future", body, headers={"Accept": "application/json"})
        results.append(answer.json())
        assert set(results[-1]) == {"loss_fn_output_type", "loss_fn_outputs", "metrics"}
    new = pb.ForwardBackwardOutput.FromString(raw.result(raw.forward_backward(run, 3))["protobuf"])
    arrays = {
        name: {"data": np.frombuffer(field.data, "<f4").tolist(), "dtype": "float32", "shape": [8]}
        for name, field in new.loss_fn_outputs[0].fields.items()
    }
    assert set(arrays) == {"logprobs", "elementwise_loss"}
    for result in results:
        assert result["loss_fn_outputs"] == [arrays]
        assert result["metrics"] == dict(new.metrics)
    broken = {"model_id": run, "seq_id": 4, "forward_input": {"data": [5], "loss_fn": "cross_entropy"}}
    failure = raw.result(raw.ok("forward", broken)["request_id"])
    assert (failure["category"], failure["error"].startswith("data[0]")) == ("user", True)
    assert raw.post("forward", {"seq_id": 5}).status_code == 400
    assert "error" not in raw.result(raw.optim(run, 5))


def test_an_old_client_reads_samples_as_json(raw: Raw) -> None:
    body = {**SAMPLE, "prompt_logprobs": True, "topk_prompt_logprobs": 2, "num_samples": 2}
    body["sampling_params"] = {"max_tokens": 3, "seed": 1, "stop": []}
    promise = raw.ok("asample", body)["request_id"]
    answer = raw.post("retrieve_future", {"request_id": promise}, headers={"Accept": "application/json"})
    result = answer.json()
    assert [len(each["tokens"]) for each in result["sequences"]] == [3, 3]
    assert [len(each["logprobs"]) for each in result["sequences"]] == [3, 3]
    assert {each["stop_reason"] for each in result["sequences"]} == {"length"}
    assert result["prompt_logprobs"][0] is None
    assert [row and len(row) for row in result["topk_prompt_logprobs"]] == [None, 2, 2]
    assert result["topk_prompt_logprobs"][1][0][1] >= result["prompt_logprobs"][1]


def test_a_sampling_clients_completions_can_be_asked_for_together(small: Raw) -> None:
    sampling = {"session_id": small.session(), "sampling_session_seq_id": 0, "base_model": MODEL}
    sampler = small.ok("create_sampling_session", sampling)["sampling_session_id"]
    promises = [
        small.ok("asample", {**SAMPLE, "base_model": None, "sampling_session_id": sampler, "seq_id": seq})[
            "request_id"
        ]
        for seq in (0, 1, 3 * 10**9)
    ]
    for promise in promises:
        small.result(promise)
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": 0}
    first = small.ok("retrieve_futures", {"target": target, "prev_cursor": 0})
    assert [done["request_id"] for done in first["completions"]] == promises[:2]
    assert all(done["state"] == "finished" for done in first["completions"])
    assert first["completions"][0]["response_payload_uncompressed_size"] > 0
    again = small.ok("retrieve_futures", {"target": target, "prev_cursor": first["cursor"], "timeout": 0})
    assert again == {"completions": [], "cursor": first["cursor"]}
    clone = {**target, "cloned_sampler_id": 3}
    other = small.ok("retrieve_futures", {"target": clone, "prev_cursor": 0})
    assert [done["request_id"] for done in other["completions"]] == promises[2:]
    unknown = {**target, "sampling_session_id": "none"}
    assert small.post("retrieve_futures", {"target": unknown, "prev_cursor": 0}).status_code == 404


def test_clones_of_a_sampling_client_get_numbers_of_their_own(raw: Raw) -> None:
    sampling = {"session_id": raw.session(), "sampling_session_seq_id": 0, "base_model": MODEL}
    body = {"sampling_session_id": raw.ok("create_sampling_session", sampling)["sampling_session_id"]}
    assert [raw.ok("join_sampling_session", body)["client_counter"] for _ in range(3)] == [1, 2, 3]


# The rest


def test_client_config_has_every_field_that_the_sdk_knows(raw: Raw) -> None:
    from tinker.types import ClientConfigResponse, ClientDynamicConfigResponse

    config = raw.ok("client/config", {"sdk_version": "0.38.0"})
    assert set(config) >= set(ClientConfigResponse.model_fields)
    assert config["parallel_fwdbwd_chunks"]
    assert config["proto_compress_fwdbwd"]
    assert not config["sample_use_retrieve_futures"]
    dynamic = raw.ok("client/dynamic_config", {"sdk_version": "0.38.0"})
    assert set(dynamic) == set(ClientDynamicConfigResponse.model_fields)


def test_a_client_behind_a_proxy_is_told_the_models_name_as_its_tokenizer(raw: Raw, run: str) -> None:
    near = raw.post("get_info", {"model_id": run}).json()["model_data"]["tokenizer_id"]
    far = raw.post("get_info", {"model_id": run}, headers={"X-Forwarded-For": "10.0.0.1"}).json()
    assert Path(near).is_dir()
    assert far["model_data"]["tokenizer_id"] == MODEL


def test_a_full_disk_while_saving_is_an_error_and_the_earlier_checkpoint_stays(
    hardy: Server,
) -> None:
    raw = hardy.raw()
    run = raw.run(raw.session())
    path = raw.result(raw.save(run, 1, "whole"))["path"]
    folder = hardy.data / "blobs" / "checkpoints"
    before = sorted(folder.iterdir())
    hardy.limit_file_size(1000)
    assert "error" in raw.result(raw.save(run, 2, "torn"))
    again = raw.result(raw.save(run, 3, "whole", overwrite=True))
    assert "error" in again
    hardy.limit_file_size(None)
    assert sorted(folder.iterdir()) == before
    load = {"session_id": raw.session(), "model_seq_id": 0, "path": path, "optimizer": True}
    assert "error" not in raw.result(raw.ok("load_weights", load)["request_id"])
    assert "path" in raw.result(raw.save(run, 4, "torn"))


def test_a_full_disk_under_the_log_fails_what_comes_at_once(
    hardy: Server,
) -> None:
    raw = hardy.raw()
    session = raw.session()
    run = raw.run(session)
    assert "error" not in raw.result(raw.forward_backward(run, 1))
    hardy.limit_file_size(1000, everywhere=True)
    small, large = training_body(run, 2), training_body(run, 3, (500,) * 40)
    refused = [
        raw.forward_backward(run, 2, small),
        raw.forward_backward(run, 3, large, zstd=False),
        raw.optim(run, 4),
        raw.save(run, 5, "x"),
    ]
    for request_id in refused:
        result = raw.result(request_id, 10.0)
        assert "cannot write to its disk" in result["error"]
        assert result["category"] == "server"
    body = {"session_id": session, "model_seq_id": 1, "base_model": MODEL, "lora_config": {"rank": 4}}
    for path, content in (("create_model", body), ("create_session", {"tags": [], "sdk_version": "0.38.0"})):
        answer = raw.post(path, content)
        assert answer.status_code == 400
        assert "cannot write to its disk" in detail(answer)
    hardy.limit_file_size(None, everywhere=True)
    step = raw.result(raw.optim(run, 6))
    assert step["metrics"], "the gradient of seq_id 1 is still there, and the refused ones left none"
    assert "error" not in raw.result(raw.forward_backward(raw.run(session, 1), 1))
