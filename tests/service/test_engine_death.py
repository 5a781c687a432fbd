"""The engine process dies, and the server lives on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker
from tinker import types

from tests.harness import MODEL, Server, datum, descendants, kill, training_body, wait_for


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("death") / "data"
    server = Server(tiny_model, data, "--heartbeat-timeout", "2", "--poll-hold", "1")
    yield server.start()
    server.end()


def test_pending_and_later_requests_fail_with_the_newest_checkpoint_and_new_runs_work(server: Server) -> None:
    raw = server.raw()
    session = raw.session()
    away = raw.run(raw.session())
    raw.result(raw.optim(away, 1))
    wait_for(lambda: raw.get("status").json()["runs"].get("away") == 1, what="a run to be put away")

    run = raw.run(session)
    path = raw.result(raw.save(run, 1, "newest"))["path"]
    pending = [
        raw.forward_backward(run, seq_id, training_body(run, seq_id, (500,) * 40)) for seq_id in range(2, 22)
    ]
    waiting = raw.optim(run, 100)
    server.kill_engine()
    wait_for(lambda: raw.get("healthz").status_code == 503, 10, "the server to notice")
    failures = [raw.result(request_id, 30.0) for request_id in [*pending, waiting]]
    assert all(path in failure["error"] for failure in failures if "error" in failure)
    assert "error" in failures[-1]
    assert "error" in failures[-2]

    server.wait_until_ready()
    assert raw.get("status").json()["generation"] == 2
    assert path in raw.result(raw.optim(run, 101))["error"]
    fresh = raw.run(session, 1)
    assert "error" not in raw.result(raw.forward_backward(fresh, 1))
    assert "error" not in raw.result(raw.optim(away, 2)), "a run that was put away survives"


def test_the_sdk_raises_at_once_in_training_and_sampling_goes_on(server: Server) -> None:
    with server.sdk() as client:
        training = client.create_lora_training_client(MODEL, rank=4).result()
        path = training.save_weights_for_sampler("kept").result().path
        sampler = client.create_sampling_client(model_path=path).result()
        base = client.create_sampling_client(base_model=MODEL).result()
        prompt = types.ModelInput.from_ints([1, 2, 3])
        params = types.SamplingParams(max_tokens=400, seed=1, stop=[])
        expected = base.sample(prompt, 1, params).result().sequences[0].tokens
        futures = [base.sample(prompt, 1, params) for _ in range(20)]
        server.kill_engine()
        started = time.monotonic()
        with pytest.raises(tinker.RequestFailedError, match="lost"):
            training.forward_backward([datum()], "cross_entropy").result()
        assert time.monotonic() - started < 30
        for future in futures:
            assert list(future.result(timeout=120).sequences[0].tokens) == list(expected)
        assert sampler.compute_logprobs(prompt).result(timeout=60)[0] is None


def test_a_server_whose_engine_keeps_dying_ends_and_says_so(tiny_model: Path, tmp_path: Path) -> None:
    server = Server(tiny_model, tmp_path / "data").start()
    assert server.process is not None
    try:
        deadline = time.monotonic() + 60
        while server.process.poll() is None and time.monotonic() < deadline:
            for pid in descendants(server.process.pid):
                kill(pid)
            time.sleep(0.05)
        assert server.process.poll() == 1
        assert "the engine keeps dying and has been given up" in server.log()
    finally:
        server.end()
