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
import tinker
from tinker import types

from tests.harness import KEY, MODEL, Raw, Server, datum, descendants, training_body, wait_for
from tests.service.test_books import usage

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
    thread: threading.Thread | None = None


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
    name = "stopped"
    assert _look(stopped.raw, stopped.runs[name], stopped.seqs[name]) == stopped.results["whole"]


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


def test_a_session_that_finishes_leaves_no_snapshots(stopped: World) -> None:
    raw, folder = stopped.raw, stopped.server.data / "blobs" / "snapshots"
    before = len(list(folder.iterdir()))
    session = raw.session()
    raw.result(raw.optim(raw.run(session), 1))
    assert len(list(folder.iterdir())) == before
    mine = stopped.runs["whole"].partition(":train:")[0]
    raw.ok(f"sessions/{mine}/finish", {"reason": {"type": "success"}})
    wait_for(lambda: not list(folder.iterdir()), what="the snapshots to be removed")


def _begin(raw: Raw, run: str, optimizer: object = None) -> list[str]:
    """Commands of all kinds, all of them answered, with gradients accumulated at the end."""
    sent = [
        raw.forward_backward(run, 1, training_body(run, 1, (9, 5))),
        raw.optim(run, 2, learning_rate=0.01),
        raw.forward_backward(run, 3, training_body(run, 3, (5,), "no_such_loss")),
        raw.save(run, 4, "early"),
        raw.forward_backward(run, 5, training_body(run, 5, (7, 7))),
        raw.optim(run, 6, learning_rate=0.02),
        str(raw.ok("load_weights", {"model_id": run, "seq_id": 7, "path": f"tinker://{run}/weights/early",
                                    "optimizer": False})["request_id"]),
        raw.forward_backward(run, 8, training_body(run, 8, (12,))),
        raw.optim(run, 9, learning_rate=0.01),
        str(raw.ok("save_weights_for_sampler", {"model_id": run, "seq_id": 10, "sampling_session_seq_id": 7})[
            "request_id"
        ]),
        raw.forward_backward(run, 11, training_body(run, 11, (30, 3))),
    ]  # fmt: skip
    for each in sent:
        raw.result(each)
    return sent


def _go_on(raw: Raw, run: str) -> list[str]:
    """More of them, of which nobody waits for any."""
    return [
        raw.forward_backward(run, 12, training_body(run, 12, (400,) * 10)),
        raw.optim(run, 13, learning_rate=0.01),
        raw.save(run, 14, "late"),
        raw.forward_backward(run, 15, training_body(run, 15, (5,), "no_such_loss")),
        raw.forward_backward(run, 16, training_body(run, 16, (6,))),
        raw.optim(run, 17, learning_rate=0.01),
        raw.forward_backward(run, 18, training_body(run, 18, (6, 9))),
    ]


def _same(raw: Raw, mine: list[str], twins: list[str], run: str, twin: str) -> None:
    def plain(request_id: str, owner: str) -> object:
        session = owner.partition(":train:")[0]
        return json.dumps(raw.result(request_id), default=repr).replace(owner, "RUN").replace(session, "S")

    for one, other in zip(mine, twins, strict=True):
        assert plain(one, run) == plain(other, twin)


@dataclass
class Loop:
    """A training loop of the SDK's, of which nobody tells it that the server goes away."""

    url: str
    losses: list[object] = field(default_factory=list)
    error: BaseException | None = None

    def run(self) -> None:
        try:
            with tinker.ServiceClient(base_url=self.url, api_key=KEY) as client:
                training = client.create_lora_training_client(MODEL, rank=4, seed=3).result()
                for step in range(10):
                    passed = [
                        training.forward_backward([datum(50, step + i)] * 4, "cross_entropy")
                        for i in range(2)
                    ]
                    stepped = training.optim_step(types.AdamParams(learning_rate=0.01))
                    if step in (3, 7):
                        training.save_state(f"step-{step}").result()
                    self.losses.append([each.result().metrics for each in passed])
                    self.losses.append(stepped.result().metrics)
        except BaseException as error:
            self.error = error


@pytest.fixture(scope="module")
def crashed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """After an orderly stop, some more work, and a power cut directly after an acknowledgement."""
    server = Server(tiny_model, tmp_path_factory.mktemp("crashed") / "data").start()
    world = World(server, raw := server.raw())
    session = raw.session()
    for place, name in enumerate(("saved", "gone", "untouched")):
        world.runs[name] = raw.run(session, place)
        raw.result(raw.optim(world.runs[name], 1))
    assert server.stop(signal.SIGINT) == 0
    server.start()

    run = world.runs["saved"]
    world.results["path"] = raw.result(raw.save(run, 2, "newest"))["path"]
    world.results["done"] = raw.optim(run, 3)
    raw.result(world.results["done"])
    world.results["waiting"] = raw.optim(run, 9)
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

    gone = world.runs["gone"]
    world.results["gone"] = raw.result(raw.save(gone, 2, "mine"))["path"]
    load = {"model_id": gone, "seq_id": 3, "path": world.results["path"], "optimizer": True}
    assert "error" not in raw.result(raw.ok("load_weights", load)["request_id"])
    raw.result(raw.optim(gone, 4))

    world.runs["sudden"] = run = raw.run(session, 3)
    world.results["before"] = _begin(raw, run)
    world.results["after"] = _go_on(raw, run)
    world.results["loop"] = loop = Loop(server.url)
    world.thread = threading.Thread(target=loop.run)
    world.thread.start()
    wait_for(lambda: len(loop.losses) >= 6 or loop.error, what="some steps of the loop")
    server.kill()
    blobs = server.data / "blobs"
    (blobs / "bodies").mkdir(exist_ok=True)
    (blobs / "bodies" / "orphan").write_bytes(b"x")
    (blobs / "checkpoints" / "orphan").mkdir()
    server.start()
    yield world
    server.end()


def test_what_was_acknowledged_before_a_crash_is_carried_out_as_if_nothing_had_been(crashed: World) -> None:
    raw, run = crashed.raw, crashed.runs["sudden"]
    twin = raw.run(raw.session())
    before = _begin(raw, twin)
    _same(raw, crashed.results["after"], _go_on(raw, twin), run, twin)
    _same(raw, crashed.results["before"], before, run, twin)
    assert _look(raw, run, 19) == _look(raw, twin, 19)
    rows = usage(crashed.server, "--by", "session")
    (mine,) = [row for row in rows if row["session"] == run.partition(":train:")[0]]
    (its,) = [row for row in rows if row["session"] == twin.partition(":train:")[0]]
    assert mine["train"] == its["train"] == str(9 + 5 + 14 + 12 + 33 + 4000 + 6 + 15 + 8)


def test_a_loop_of_the_sdk_goes_on_over_a_crash_as_if_nothing_had_been(crashed: World) -> None:
    loop, twin = crashed.results["loop"], Loop(crashed.server.url)
    assert crashed.thread is not None
    crashed.thread.join(60)
    twin.run()
    assert (loop.error, twin.error) == (None, None)
    assert len(loop.losses) == 20
    assert loop.losses == twin.losses


def test_a_run_with_nothing_outstanding_comes_back_with_its_next_request(crashed: World) -> None:
    raw, run = crashed.raw, crashed.runs["saved"]
    for seq_id in (6, 8, 7):
        last = raw.optim(run, seq_id)
    for request_id in (last, crashed.results["waiting"]):
        assert "error" not in raw.result(request_id)
    assert "replayed" not in raw.get(f"training_runs/{run}").text


def test_results_from_before_a_crash_can_still_be_fetched(crashed: World) -> None:
    assert "error" not in crashed.raw.result(crashed.results["done"])


def test_a_run_that_was_not_touched_since_the_stop_survives_the_crash(crashed: World) -> None:
    assert "error" not in crashed.raw.result(crashed.raw.optim(crashed.runs["untouched"], 2))


def test_a_run_whose_log_cannot_be_replayed_says_why_and_names_its_newest_checkpoint(crashed: World) -> None:
    raw, run = crashed.raw, crashed.runs["gone"]
    deleted = crashed.results["path"].removeprefix("tinker://").replace("/weights/", "/checkpoints/weights/")
    assert raw.http.delete(f"training_runs/{deleted}").status_code == 200
    for request_id in (raw.optim(run, 5), raw.forward_backward(run, 9)):
        failure = raw.result(request_id, 5.0)
        assert failure["category"] == "server"
        assert "the checkpoint that seq_id 3 loaded is gone" in failure["error"]
        path = crashed.results["gone"]
        assert f'create_training_client_from_state_with_optimizer("{path}")' in failure["error"]
    assert raw.get(f"training_runs/{run}").json()["corrupted"] is True
    again = _load(raw, crashed.results["gone"])
    assert "error" not in raw.result(raw.optim(again["model_id"], 1))


def test_a_forgotten_sample_is_a_410_and_a_named_sampler_gives_the_same_again(crashed: World) -> None:
    request_id, before = crashed.results["named"]
    assert crashed.raw.retrieve(request_id).status_code == 410
    body = {**SAMPLE, "sampling_session_id": crashed.runs["named"], "seq_id": 1}
    assert crashed.raw.result(crashed.raw.ok("asample", body)["request_id"]) == before


def test_a_sampler_without_a_name_comes_back_with_its_run_bitwise(crashed: World) -> None:
    body = {**SAMPLE, "sampling_session_id": crashed.runs["unnamed"], "seq_id": 1}
    assert crashed.raw.result(crashed.raw.ok("asample", body)["request_id"]) == crashed.results["unnamed"][1]
    assert crashed.results["unnamed"][1] == crashed.results["named"][1]


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
