"""The engine process dies, and the server lives on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tinker import types

from tests.harness import MODEL, Server, datum, descendants, kill, training_body, wait_for


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("death") / "data"
    server = Server(tiny_model, data, "--heartbeat-timeout", "2", "--poll-hold", "1")
    yield server.start()
    server.end()


def test_what_was_under_way_is_carried_out_by_the_next_engine_and_runs_go_on_bitwise(server: Server) -> None:
    raw = server.raw()
    away = raw.run(raw.session())
    raw.result(raw.optim(away, 1))
    wait_for(lambda: raw.get("status").json()["runs"].get("away") == 1, what="a run to be put away")

    def train(run: str, *, kills: int = 0) -> list[dict[str, object]]:
        """A loop of which the engine dies when a save, a load and accumulated gradients are under way."""
        sent = []
        for seq_id in range(1, 24):
            match seq_id % 6:
                case 0:
                    sent.append(raw.save(run, seq_id, f"at-{seq_id}"))
                case 3:
                    sent.append(raw.optim(run, seq_id, learning_rate=0.01))
                case _:
                    sent.append(raw.forward_backward(run, seq_id, training_body(run, seq_id, (500,) * 4)))
            if kills and seq_id in (8, 23):
                raw.result(sent[4])
                server.kill_engine()
                wait_for(lambda: raw.get("healthz").status_code == 503, 10, "the server to notice")
                server.wait_until_ready()
        return [raw.result(each) for each in sent]

    run, twin = raw.run(raw.session()), raw.run(raw.session())
    waiting = raw.optim(run, 100)
    generation = raw.get("status").json()["generation"]
    got = train(run, kills=2)
    assert raw.get("status").json()["generation"] == generation + 2
    expected = [json.loads(json.dumps(each, default=repr).replace(twin, run)) for each in train(twin)]
    assert [json.loads(json.dumps(each, default=repr)) for each in got] == expected
    assert raw.retrieve(waiting).json()["queue_state"] == "active", "it waits for seq_id 24 as before"
    assert "error" not in raw.result(raw.optim(away, 2)), "a run that was put away survives"
    steps = [raw.result(raw.optim(each, 24)) for each in (run, twin)]
    assert steps[0] == steps[1]


def test_the_sdk_waits_for_the_replay_in_training_and_sampling_goes_on(server: Server) -> None:
    with server.sdk() as client:
        training = client.create_lora_training_client(MODEL, rank=4, seed=3).result()
        twin = client.create_lora_training_client(MODEL, rank=4, seed=3).result()
        path = training.save_weights_for_sampler("kept").result().path
        sampler = client.create_sampling_client(model_path=path).result()
        base = client.create_sampling_client(base_model=MODEL).result()
        prompt = types.ModelInput.from_ints([1, 2, 3])
        params = types.SamplingParams(max_tokens=400, seed=1, stop=[])
        expected = base.sample(prompt, 1, params).result().sequences[0].tokens
        for each in (training, twin):
            each.forward_backward([datum()], "cross_entropy").result()
            each.optim_step(types.AdamParams(learning_rate=0.01)).result()
        unnamed = training.save_weights_and_get_sampling_client().result()
        futures = [base.sample(prompt, 1, params) for _ in range(20)]
        futures += [unnamed.sample(prompt, 1, params) for _ in range(2)]
        server.kill_engine()
        losses = [each.forward_backward([datum()], "cross_entropy").result() for each in (training, twin)]
        logprobs = [each.loss_fn_outputs[0]["logprobs"].tolist() for each in losses]
        assert logprobs[0] == logprobs[1]
        for future in futures[:20]:
            assert list(future.result(timeout=120).sequences[0].tokens) == list(expected)
        tokens = [list(each.result(timeout=120).sequences[0].tokens) for each in futures[20:]]
        assert tokens[0] == tokens[1]
        other = twin.save_weights_and_get_sampling_client().result()
        assert tokens[0] == list(other.sample(prompt, 1, params).result().sequences[0].tokens)
        assert sampler.compute_logprobs(prompt).result(timeout=60)[0] is None


@pytest.mark.slow
def test_what_the_engine_dies_of_three_times_is_given_up(tiny_model: Path, tmp_path: Path) -> None:
    server = Server(tiny_model, tmp_path / "data", "--poll-hold", "1").start()
    try:
        raw = server.raw()
        run, beside = raw.run(raw.session()), raw.run(raw.session())
        raw.result(raw.forward_backward(run, 1))
        raw.result(raw.optim(run, 2))
        deadly = raw.forward_backward(run, 3, training_body(run, 3, (500,) * 200))
        step, innocent = raw.optim(run, 4), raw.forward_backward(beside, 1)
        for death in range(3):
            wait_for(lambda: raw.retrieve(deadly).json()["queue_state"] == "active", what="it to be begun")
            time.sleep(0.5)
            server.kill_engine()
            wait_for(lambda: raw.get("healthz").status_code == 503, 10, "the server to notice")
            answer = raw.retrieve(deadly).json()
            assert death == 2 or answer["queue_state"] == "paused_capacity"
            server.wait_until_ready()
        assert "the engine died 3 times while this request was carried out" in raw.result(deadly)["error"]
        assert [each for each in (innocent, step) if "error" in raw.result(each)] == []
    finally:
        server.end()


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
