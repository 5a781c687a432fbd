"""What a session's requests went through, as a trace for Perfetto."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import tinker
from tinker import types

from tests.harness import KEY, MODEL, Server, datum, exit_code
from tests.sdk.test_cli import Program, program  # noqa: F401
from tests.wire.test_timeline import counters, slices

PROMPT = types.ModelInput.from_ints([1, 2, 3, 4])


@pytest.fixture(scope="module")
def session(server: Server) -> str:
    """A session that trained, sampled, and was refused once."""
    with server.sdk() as client:
        training = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        for _ in range(3):
            passed = training.forward_backward([datum(10)] * 4, "cross_entropy")
            training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
            passed.result()
        with pytest.raises(tinker.RequestFailedError):
            training.optim_step(types.AdamParams(learning_rate=-1.0)).result()
        sampler = training.save_weights_and_get_sampling_client().result()
        params = types.SamplingParams(max_tokens=8, stop=[])
        for sample in [sampler.sample(PROMPT, 2, params) for _ in range(10)]:
            sample.result()
        return str(training.model_id.partition(":")[0])


def export(server: Server, session: str, key: str = KEY) -> bytes:
    rest = tinker.RestClient(base_url=server.url, api_key=key)
    url = rest.export_session_trace(session).result(timeout=60)
    with urllib.request.urlopen(url, timeout=30) as response:  # plain, without a key
        return bytes(response.read())


def test_every_request_shows_its_queue_its_run_and_its_transfers(server: Server, session: str) -> None:
    data = export(server, session)
    tracks = slices(data)
    training = sorted(s for name, each in tracks.items() if ":train:" in name for s in each)
    sampling = [s for name, each in tracks.items() if ":sample:" in name for s in each]
    outer = [name for name, depth, *_ in training if depth == 0]
    assert outer == [
        "create_model 0", "forward_backward 1", "forward_backward 3", "forward_backward 5",
        "optim_step 2", "optim_step 4", "optim_step 6", "optim_step 7", "save_weights_for_sampler 8",
    ]  # fmt: skip
    assert len([name for name, depth, *_ in sampling if depth == 0]) == 10
    for phase in ("upload", "queue", "run", "download"):
        assert sum(name == phase for name, *_ in training) >= 8, phase
        assert sum(name == phase for name, *_ in sampling) == 10, phase
    counted = counters(data)
    assert counted["train tokens so far"][-1] == 120
    assert counted["sample tokens so far"][-1] == 10 * 2 * 8
    assert counted["requests running"][-1] == 0


def test_a_session_of_somebody_else_has_no_trace(server: Server, session: str) -> None:
    stranger = tinker.RestClient(base_url=server.url, api_key=server.new_key("nosy"))
    with pytest.raises(tinker.NotFoundError):
        stranger.export_session_trace(session).result(timeout=10)


def test_a_traces_url_is_good_for_that_file_alone(server: Server, session: str) -> None:
    url = server.raw().get(f"sessions/{session}/trace_export").json()["url"]
    with urllib.request.urlopen(url) as response:
        assert response.headers["content-type"] == "application/octet-stream"
    name, _, query = url.rpartition("/")[2].partition("?")
    for changed in (
        url.replace(name, "0" * 32 + ".pftrace"),
        url.replace(name, "..%2F..%2Ftinsmith.db"),
        url.replace("expires=", "expires=9"),
        url.partition("?")[0],
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(changed)
        assert refused.value.code in (401, 403, 404)
        assert detail_of(refused.value)
    assert query


def detail_of(error: urllib.error.HTTPError) -> str:
    return str(json.loads(error.read())["detail"])


def test_what_is_exported_twice_is_made_once(server: Server, session: str) -> None:
    raw = server.raw()
    first, again = (raw.get(f"sessions/{session}/trace_export").json()["url"] for _ in range(2))
    assert first.partition("?")[0] == again.partition("?")[0]


def test_the_program_downloads_a_trace(program: Program, session: str, tmp_path: Path) -> None:  # noqa: F811
    table, as_json = tmp_path / "table.pftrace", tmp_path / "json.pftrace"
    told = program.start("session", "export-trace", session, "-o", str(table))
    told_json = program.start("-f", "json", "session", "export-trace", session, "-o", str(as_json))
    done, done_json = told.result(), told_json.result()
    assert (exit_code(done), exit_code(done_json)) == (0, 0), done.stderr + done_json.stderr
    assert str(table) in done.stdout
    answer = json.loads(done_json.stdout)
    assert answer == {
        "session_id": session, "destination": str(as_json), "file_size_bytes": as_json.stat().st_size,
    }  # fmt: skip
    assert table.read_bytes() == as_json.read_bytes()
    assert slices(table.read_bytes())
    url = program.ok("session", "export-trace", session, "--url-only").strip()
    assert url.startswith(f"{program.server.url}/api/v1/traces/")
    assert "no session" in program.fails("session", "export-trace", "none")


def test_what_was_recorded_survives_a_restart(hardy: Server) -> None:
    raw = hardy.raw()
    session = raw.session()
    run = raw.run(session)
    for seq in range(1, 4):
        raw.result(raw.optim(run, seq))
    hardy.stop()
    hardy.start()
    raw = hardy.raw()
    raw.result(raw.optim(run, 4))
    outer = [s[0] for each in slices(export(hardy, session)).values() for s in each if s[1] == 0]
    assert sorted(outer) == ["create_model 0", *(f"optim_step {seq}" for seq in range(1, 5))]
