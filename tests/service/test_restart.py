"""Stopping, crashing, and what is there afterwards. Starts are slow, so tests share them."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness import MODEL, Raw, Server, descendants, training_body, wait_for

MakeServer = Callable[..., Server]

SAMPLE = {
    "seq_id": 0,
    "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
    "sampling_params": {"max_tokens": 4, "seed": 5},
}


def _train(raw: Raw, run: str, first: int, steps: int = 2) -> int:
    """Some steps that change weights, moments and, at the end, accumulated gradients."""
    seq_id = first
    for _ in range(steps):
        raw.forward_backward(run, seq_id, training_body(run, seq_id, (9, 5)))
        last = raw.optim(run, seq_id + 1, learning_rate=0.01)
        seq_id += 2
    raw.result(last)
    raw.result(raw.forward_backward(run, seq_id, training_body(run, seq_id, (7,))))
    return seq_id + 1


def _look(raw: Raw, run: str, seq_id: int) -> tuple[object, object]:
    """A step and a forward pass: they tell weights, moments and gradients apart."""
    step = raw.result(raw.optim(run, seq_id, learning_rate=0.01))
    return step, raw.result(raw.forward_backward(run, seq_id + 1))


def _load(raw: Raw, path: str) -> dict[str, Any]:
    body = {"session_id": raw.session(), "model_seq_id": 0, "path": path, "optimizer": True}
    return raw.result(raw.ok("load_weights", body)["request_id"])


def _sample(raw: Raw, sampler: str, seq_id: int) -> dict[str, Any]:
    body = {**SAMPLE, "sampling_session_id": sampler, "seq_id": seq_id}
    return raw.result(raw.ok("asample", body)["request_id"])


@dataclass
class World:
    """A server that has been stopped and started again, and what was there before."""

    server: Server
    raw: Raw
    runs: dict[str, str] = field(default_factory=dict)
    seqs: dict[str, int] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    statuses: list[int] = field(default_factory=list)
    exit_code: int | None = None
    seconds: float = 0.0
    snapshots: int = 0


@pytest.fixture(scope="module")
def stopped(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """After SIGTERM in the midst of everything."""
    server = Server(tiny_model, tmp_path_factory.mktemp("stopped") / "data", "--grace", "2").start()
    world = World(server, raw := server.raw())
    session = raw.session()
    for place, name in enumerate(("stopped", "whole", "gap", "results", "refused")):
        world.runs[name] = raw.run(session, place)
    for name in ("stopped", "whole"):
        world.seqs[name] = _train(raw, world.runs[name], 1)
    world.results["whole"] = _look(raw, world.runs["whole"], world.seqs["whole"])
    raw.result(raw.optim(world.runs["gap"], 1))
    world.results["waiting"] = raw.optim(world.runs["gap"], 3)
    trained, saved = (
        raw.forward_backward(world.runs["results"], 1),
        raw.save(world.runs["results"], 2, "kept"),
    )
    world.results["results"] = {each: raw.result(each) for each in (trained, saved)}
    world.results["path"] = raw.result(saved)["path"]
    published = {"model_id": world.runs["results"], "seq_id": 3, "sampling_session_seq_id": 0}
    unnamed = raw.result(raw.ok("save_weights_for_sampler", published)["request_id"])["sampling_session_id"]
    world.results["unnamed"] = unnamed, _sample(raw, unnamed, 0)
    raw.result(raw.optim(world.runs["results"], 4))  # the run's own weights go on
    raw.result(raw.optim(world.runs["refused"], 2, beta1=7))
    poll = threading.Thread(
        target=lambda: world.statuses.append(raw.retrieve(world.results["waiting"]).status_code)
    )
    poll.start()
    time.sleep(0.5)
    assert server.process is not None
    before = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    world.statuses.append(raw.post("create_session", {"sdk_version": "x"}).status_code)
    world.exit_code = server.process.wait(60)
    world.seconds = time.monotonic() - before
    poll.join(10)
    world.snapshots = len(list((server.data / "blobs" / "snapshots").iterdir()))
    server.start()
    yield world
    server.end()


def test_a_stop_ends_in_order_and_leaves_no_process_behind(stopped: World) -> None:
    assert stopped.exit_code == 0
    assert stopped.seconds < 15
    assert stopped.snapshots == 5


def test_a_stop_refuses_new_work_with_a_503_and_wakes_who_waits(stopped: World) -> None:
    assert sorted(stopped.statuses) == [408, 503]


def test_after_a_stop_a_run_goes_on_bitwise(stopped: World) -> None:
    folder = stopped.server.data / "blobs" / "snapshots"
    before = len(list(folder.iterdir()))
    name = "stopped"
    assert _look(stopped.raw, stopped.runs[name], stopped.seqs[name]) == stopped.results["whole"]
    wait_for(lambda: len(list(folder.iterdir())) < before, what="its snapshot to be removed")


def test_results_and_checkpoints_survive_a_stop(stopped: World) -> None:
    for request_id, result in stopped.results["results"].items():
        assert stopped.raw.result(request_id) == result
    assert _load(stopped.raw, stopped.results["path"])["type"] == "load_weights"


def test_a_sampler_without_a_name_survives_a_stop_bitwise(stopped: World) -> None:
    unnamed, before = stopped.results["unnamed"]
    again = _sample(stopped.raw, unnamed, 1)
    assert again["protobuf"].replace(b":1", b":0") == before["protobuf"].replace(b":1", b":0")


def test_what_waited_behind_a_gap_at_a_stop_goes_on_after_the_start(stopped: World) -> None:
    assert "error" not in stopped.raw.result(stopped.raw.optim(stopped.runs["gap"], 2))
    assert "error" not in stopped.raw.result(stopped.results["waiting"])


def test_a_refused_request_has_used_up_its_place_across_a_stop(stopped: World) -> None:
    raw, run = stopped.raw, stopped.runs["refused"]
    after = raw.optim(run, 3)
    raw.optim(run, 1)
    assert "error" not in raw.result(after, 10.0)


@pytest.fixture(scope="module")
def crashed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """After an orderly stop, some more work, and a power cut."""
    server = Server(tiny_model, tmp_path_factory.mktemp("crashed") / "data").start()
    world = World(server, raw := server.raw())
    session = raw.session()
    for place, name in enumerate(("saved", "unsaved", "untouched")):
        world.runs[name] = raw.run(session, place)
        raw.result(raw.optim(world.runs[name], 1))
    assert server.stop(signal.SIGINT) == 0
    server.start()

    run = world.runs["saved"]
    world.results["path"] = raw.result(raw.save(run, 2, "newest"))["path"]
    world.results["done"] = raw.optim(run, 3)
    raw.result(world.results["done"])
    world.results["waiting"] = raw.optim(run, 9)
    raw.result(raw.optim(world.runs["unsaved"], 2))
    for kind, body in (("named", {"path": "named"}), ("unnamed", {"sampling_session_seq_id": 1})):
        seq_id = 4 if kind == "named" else 5
        request_id = raw.ok("save_weights_for_sampler", {"model_id": run, "seq_id": seq_id, **body})[
            "request_id"
        ]
        world.results[kind] = raw.result(request_id)
    named = {
        "session_id": session,
        "sampling_session_seq_id": 0,
        "model_path": world.results["named"]["path"],
    }
    world.runs["named"] = raw.ok("create_sampling_session", named)["sampling_session_id"]
    world.runs["unnamed"] = world.results["unnamed"]["sampling_session_id"]
    for kind in ("named", "unnamed"):
        promise = raw.ok("asample", {**SAMPLE, "sampling_session_id": world.runs[kind]})
        world.results[kind] = promise["request_id"], raw.result(promise["request_id"])
    server.kill()
    blobs = server.data / "blobs"
    (blobs / "bodies").mkdir(exist_ok=True)
    (blobs / "bodies" / "orphan").write_bytes(b"x")
    (blobs / "checkpoints" / "orphan").mkdir()
    server.start()
    yield world
    server.end()


def test_after_a_crash_a_run_says_so_and_names_its_newest_checkpoint(crashed: World) -> None:
    raw, run, path = crashed.raw, crashed.runs["saved"], crashed.results["path"]
    for request_id in (crashed.results["waiting"], raw.optim(run, 6), raw.forward_backward(run, 8)):
        failure = raw.result(request_id, 5.0)
        assert failure["category"] == "server"
        assert f'create_training_client_from_state_with_optimizer("{path}")' in failure["error"]
    again = _load(raw, path)
    assert "error" not in raw.result(raw.optim(again["model_id"], 1))


def test_results_from_before_a_crash_can_still_be_fetched(crashed: World) -> None:
    assert "error" not in crashed.raw.result(crashed.results["done"])


def test_a_run_without_a_checkpoint_says_that_there_is_none(crashed: World) -> None:
    assert (
        "it has no checkpoint" in crashed.raw.result(crashed.raw.optim(crashed.runs["unsaved"], 3))["error"]
    )


def test_a_run_that_was_not_touched_since_the_stop_survives_the_crash(crashed: World) -> None:
    assert "error" not in crashed.raw.result(crashed.raw.optim(crashed.runs["untouched"], 2))


def test_a_forgotten_sample_is_a_410_and_a_named_sampler_gives_the_same_again(crashed: World) -> None:
    request_id, before = crashed.results["named"]
    assert crashed.raw.retrieve(request_id).status_code == 410
    body = {**SAMPLE, "sampling_session_id": crashed.runs["named"], "seq_id": 1}
    assert crashed.raw.result(crashed.raw.ok("asample", body)["request_id"]) == before


def test_a_sampler_without_a_name_is_gone_and_says_what_to_do(crashed: World) -> None:
    assert crashed.results["unnamed"][1] == crashed.results["named"][1]
    answer = crashed.raw.post(
        "asample", {**SAMPLE, "sampling_session_id": crashed.runs["unnamed"], "seq_id": 1}
    )
    assert answer.status_code == 410
    assert "save_weights_and_get_sampling_client" in answer.json()["detail"]


def test_files_that_nothing_refers_to_are_removed_at_the_start(crashed: World) -> None:
    blobs = crashed.server.data / "blobs"
    assert not (blobs / "bodies" / "orphan").exists()
    assert not (blobs / "checkpoints" / "orphan").exists()


def test_a_second_signal_stops_at_once(make_server: MakeServer) -> None:
    server = make_server().start()
    raw = server.raw()
    run = raw.run(raw.session())
    for seq_id in range(1, 40):
        raw.forward_backward(run, seq_id, training_body(run, seq_id, (500,) * 60))
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    started = time.monotonic()
    engine = descendants(server.process.pid)
    server.stop()
    assert time.monotonic() - started < 6
    assert not any(Path(f"/proc/{pid}").exists() for pid in engine)


def test_another_base_model_under_the_same_name_is_refused(
    make_server: MakeServer, tiny_model: Path, tmp_path: Path
) -> None:
    server = make_server().start()
    raw = server.raw()
    run = raw.run(raw.session())
    path = raw.result(raw.save(run, 1, "old"))["path"]
    server.stop()

    other = shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 12345.0
    (other / "config.json").write_text(json.dumps(config))
    server.models[MODEL] = other
    server.start()
    resumed = raw.result(raw.optim(run, 2))["error"]
    assert "not the base model that this training run began with" in resumed
    assert "another base model" in _load(raw, path)["error"]
    sampling = {"session_id": raw.session(), "sampling_session_seq_id": 0, "model_path": path}
    answer = raw.post("create_sampling_session", sampling)
    assert (answer.status_code, "another base model" in answer.text) == (400, True)

    server.stop()
    server.models[MODEL] = tiny_model
    server.start()
    assert "error" not in raw.result(raw.optim(run, 3))


def test_two_servers_cannot_share_a_data_folder(stopped: World, tiny_model: Path) -> None:
    second = Server(tiny_model, stopped.server.data)
    second.log_file = second.log_file.with_suffix(".second")
    second.start(wait=False)
    assert second.process is not None
    assert second.process.wait(30) == 2
    assert "in use by another server" in second.log()
    assert httpx.get(f"{stopped.server.url}/api/v1/healthz").status_code == 200
