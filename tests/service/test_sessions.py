"""Clients that finish, and clients that fall silent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.harness import Raw, Server, detail, training_body, wait_for

SAMPLE = {
    "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
    "sampling_params": {"max_tokens": 4, "seed": 5},
}


@pytest.fixture(scope="module")
def brisk(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits for nothing long."""
    data = tmp_path_factory.mktemp("brisk") / "data"
    server = Server(tiny_model, data, "--heartbeat-timeout", "1", "--result-ttl", "2")
    yield server.start()
    server.end()


def _status(raw: Raw) -> dict[str, object]:
    answer: dict[str, object] = raw.get("status").json()
    return answer


def test_a_client_that_vanishes_loses_memory_but_no_state(brisk: Server) -> None:
    raw = brisk.raw()
    session = raw.session()
    silent, whole = raw.run(session, 0), raw.run(session, 1)
    for run in (silent, whole):
        raw.forward_backward(run, 1, training_body(run, 1, (9,)))
        raw.result(raw.optim(run, 2, learning_rate=0.01))
        raw.result(raw.forward_backward(run, 3, training_body(run, 3, (5,))))
    expected = [raw.result(raw.optim(whole, 4)), raw.result(raw.forward_backward(whole, 5))]
    wait_for(lambda: "live" not in _status(raw)["runs"], what="the runs to be put away")  # type: ignore[operator]
    wait_for(lambda: _status(raw)["engine"]["runs"] == 0, what="the engine to be empty")  # type: ignore[index]
    assert [raw.result(raw.optim(silent, 4)), raw.result(raw.forward_backward(silent, 5))] == expected


def test_a_heartbeat_keeps_a_client_alive(brisk: Server) -> None:
    raw = brisk.raw()
    session = raw.session()
    run = raw.run(session)
    for _ in range(8):
        time.sleep(0.3)
        assert raw.ok("session_heartbeat", {"session_id": session}) == {"type": "session_heartbeat"}
    assert _status(raw)["runs"]["live"] == 1  # type: ignore[index]
    raw.result(raw.optim(run, 1))


def test_a_vanished_clients_samples_are_cancelled_and_its_unnamed_samplers_released(
    brisk: Server,
) -> None:
    raw = brisk.raw()
    session = raw.session()
    run = raw.run(session)
    unnamed = {"model_id": run, "seq_id": 1, "sampling_session_seq_id": 0}
    sampler = raw.result(raw.ok("save_weights_for_sampler", unnamed)["request_id"])["sampling_session_id"]
    params = {"max_tokens": 400, "stop": []}
    body = {**SAMPLE, "sampling_params": params, "sampling_session_id": sampler, "num_samples": 64}
    raw.ok("asample", {**body, "seq_id": 0})
    wait_for(lambda: _status(raw)["samples"] == 0, what="the sample to be cancelled")
    wait_for(lambda: _status(raw)["engine"]["samplers"] == 0, what="the sampler to go")  # type: ignore[index]
    assert raw.post("asample", {**body, "seq_id": 1}).status_code == 410


def test_a_finished_session_takes_no_more_and_frees_its_memory(server: Server) -> None:
    raw = server.raw()
    session = raw.session()
    run = raw.run(session)
    before = _status(raw)["engine"]["runs"]  # type: ignore[index]
    last = raw.optim(run, 1)
    body = {"reason": {"type": "success"}, "detail": None}
    assert raw.post(f"sessions/{session}/finish", body).is_success
    assert raw.post(f"sessions/{session}/finish", body).is_success  # again
    assert "error" not in raw.result(last)
    wait_for(lambda: _status(raw)["engine"]["runs"] < before, what="the run to be released")  # type: ignore[index, operator]
    assert "session of this training run has finished" in raw.result(raw.optim(run, 2))["error"]
    assert raw.post("session_heartbeat", {"session_id": session}).status_code == 410
    create = {
        "session_id": session,
        "model_seq_id": 1,
        "base_model": "tests/tiny",
        "lora_config": {"rank": 4},
    }
    assert raw.post("create_model", create).status_code == 410
    sampling = {"session_id": session, "sampling_session_seq_id": 1, "base_model": "tests/tiny"}
    assert raw.post("create_sampling_session", sampling).status_code == 410


def test_a_finished_session_takes_its_snapshots_along(brisk: Server) -> None:
    raw = brisk.raw()
    session = raw.session()
    raw.result(raw.optim(raw.run(session), 1))
    wait_for(lambda: "live" not in _status(raw)["runs"], what="the run to be put away")  # type: ignore[operator]
    folder = brisk.data / "blobs" / "snapshots"
    before = len(list(folder.iterdir()))
    raw.ok(f"sessions/{session}/finish", {})
    wait_for(lambda: len(list(folder.iterdir())) < before, what="the snapshot to go")


def test_a_cancelled_sample_fails_and_stops(server: Server) -> None:
    raw = server.raw()
    sampling = {"session_id": raw.session(), "sampling_session_seq_id": 0, "base_model": "tests/tiny"}
    sampler = raw.ok("create_sampling_session", sampling)["sampling_session_id"]
    body = {
        **SAMPLE,
        "sampling_params": {"max_tokens": 500, "stop": []},
        "num_samples": 64,
        "sampling_session_id": sampler,
        "seq_id": 0,
    }
    request_id = raw.ok("asample", body)["request_id"]
    assert raw.ok("cancel_future", {"request_id": request_id}) == {}
    assert raw.result(request_id) == {"error": "cancelled", "category": "user"}
    wait_for(lambda: _status(raw)["engine"]["samples_pending"] == 0, 5.0, "it to stop")  # type: ignore[index]
    assert raw.post("cancel_future", {"request_id": "unknown:sample:0:0"}).is_success


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_sampler_whose_checkpoint_is_gone_says_so_at_once(server: Server, how: str) -> None:
    raw = server.raw()
    session = raw.session()
    run = raw.run(session)
    save = {"model_id": run, "path": "w", "overwrite": True}
    path = raw.result(raw.ok("save_weights_for_sampler", {**save, "seq_id": 1})["request_id"])["path"]

    def sampler(place: int) -> str:
        body = {"session_id": session, "sampling_session_seq_id": place, "model_path": path}
        return str(raw.ok("create_sampling_session", body)["sampling_session_id"])

    def sample(of: str, seq_id: int) -> httpx.Response:
        return raw.post("asample", {**SAMPLE, "sampling_session_id": of, "seq_id": seq_id})

    old = sampler(0)
    assert "protobuf" in raw.result(sample(old, 0).json()["request_id"])
    if how == "deleted":
        assert raw.http.delete(f"training_runs/{run}/checkpoints/sampler_weights/w").is_success
    else:
        raw.result(raw.ok("save_weights_for_sampler", {**save, "seq_id": 2})["request_id"])
        assert "protobuf" in raw.result(sample(sampler(1), 0).json()["request_id"])
    answer = sample(old, 1)
    assert (answer.status_code, f"{path} is gone" in detail(answer)) == (410, True)


def test_results_are_kept_for_a_while_after_they_were_fetched(brisk: Server) -> None:
    raw = brisk.raw()
    run = raw.run(raw.session())
    fetched, not_fetched = raw.forward_backward(run, 1), raw.forward_backward(run, 2)
    first = raw.result(fetched)
    assert raw.result(fetched) == first
    wait_for(lambda: raw.retrieve(fetched).status_code == 404, 20.0, "the result to be swept")
    assert "not kept any more" in raw.retrieve(fetched).json()["detail"]
    assert "protobuf" in raw.result(not_fetched)


@pytest.mark.parametrize("kind", ["weights", "sampler_weights"])
def test_a_checkpoint_whose_time_has_come_is_deleted(brisk: Server, kind: str) -> None:
    raw = brisk.raw()
    run = raw.run(raw.session())
    route = "save_weights" if kind == "weights" else "save_weights_for_sampler"
    body = {"model_id": run, "seq_id": 1, "path": "brief", "ttl_seconds": 3600}
    path = raw.result(raw.ok(route, body)["request_id"])["path"]
    assert raw.post("weights_info", {"tinker_path": path}).is_success
    brisk.expire_checkpoints()
    folder = brisk.data / "blobs" / "checkpoints"
    wait_for(lambda: not any(folder.iterdir()), what="the folder to be deleted")
    assert raw.post("weights_info", {"tinker_path": path}).status_code == 404
