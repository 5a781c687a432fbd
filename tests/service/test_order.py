"""The command log: order, retries, gaps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import Raw, Server, training_body, wait_for

GAP = 1.0


@pytest.fixture(scope="module")
def raw(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Raw]:
    server = Server(
        tiny_model, tmp_path_factory.mktemp("order") / "data", "--gap-timeout", str(GAP), "--poll-hold", "0.3"
    )
    yield server.start().raw()
    server.end()


@pytest.fixture
def run(raw: Raw) -> str:
    return raw.run(raw.session())


def test_requests_run_in_the_order_of_their_numbers_however_they_arrive(raw: Raw, run: str) -> None:
    forward = training_body(run, 3, (8,))
    last = raw.forward_backward(run, 3, forward)
    step = raw.optim(run, 2)
    assert raw.retrieve(last).status_code == 408
    first = raw.forward_backward(run, 1)
    results = [raw.result(each) for each in (first, step, last)]
    assert all("error" not in result for result in results)

    other = raw.run(raw.session())
    in_order = [raw.result(raw.forward_backward(other, 1)), raw.result(raw.optim(other, 2))]
    in_order.append(raw.result(raw.forward_backward(other, 3, training_body(other, 3, (8,)))))
    assert in_order == results


def test_a_retry_is_told_the_first_request_id_and_runs_once(raw: Raw, run: str) -> None:
    first = [raw.forward_backward(run, 1) for _ in range(3)]
    assert len(set(first)) == 1
    result = raw.result(first[0])
    assert raw.result(first[0]) == result
    assert raw.forward_backward(run, 1) == first[0]
    assert raw.result(first[0]) == result
    raw.result(raw.optim(run, 2))


def test_of_two_different_requests_with_one_number_the_first_one_counts(raw: Raw, run: str) -> None:
    first = raw.optim(run, 1)
    assert raw.save(run, 1, "never") == first
    assert "path" not in raw.result(first)
    assert raw.get(f"training_runs/{run}/checkpoints").json()["checkpoints"] == []


def test_creates_are_idempotent(raw: Raw) -> None:
    session = raw.session()
    body = {"session_id": session, "model_seq_id": 4, "base_model": "tests/tiny", "lora_config": {"rank": 4}}
    receipts = [raw.ok("create_model", body) for _ in range(3)]
    assert {receipt["model_id"] for receipt in receipts} == {f"{session}:train:4"}
    assert len({receipt["request_id"] for receipt in receipts}) == 1
    assert raw.result(receipts[0]["request_id"]) == {"type": "create_model", "model_id": f"{session}:train:4"}
    sampling = {"session_id": session, "sampling_session_seq_id": 2, "base_model": "tests/tiny"}
    assert len({raw.ok("create_sampling_session", sampling)["sampling_session_id"] for _ in range(3)}) == 1


def test_a_run_that_comes_from_a_checkpoint_is_created_once(raw: Raw, run: str) -> None:
    path = raw.result(raw.save(run, 1, "state"))["path"]
    session = raw.session()
    body = {"session_id": session, "model_seq_id": 0, "path": path, "optimizer": True}
    receipts = [raw.ok("load_weights", body) for _ in range(2)]
    assert receipts[0] == receipts[1]
    loaded = raw.result(receipts[0]["request_id"])
    assert loaded == {"type": "load_weights", "path": path, "model_id": f"{session}:train:0"}
    raw.result(raw.optim(loaded["model_id"], 1))


def test_samples_are_idempotent(raw: Raw) -> None:
    session = raw.session()
    sampling = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tests/tiny"}
    body = {
        "sampling_session_id": raw.ok("create_sampling_session", sampling)["sampling_session_id"],
        "seq_id": 5_000_000_000_000,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 8},
    }
    promises = [raw.ok("asample", body) for _ in range(2)]
    assert promises[0] == promises[1]
    assert raw.result(promises[0]["request_id"]) == raw.result(promises[0]["request_id"])


def test_a_request_waits_for_its_predecessor_and_says_so(raw: Raw, run: str) -> None:
    waiting = raw.optim(run, 2)
    answer = raw.retrieve(waiting)
    assert answer.status_code == 408
    assert answer.json() == {
        "type": "try_again",
        "request_id": waiting,
        "queue_state": "active",
        "queue_state_reason": "waiting for the request with seq_id 1",
    }


def test_a_gap_that_never_closes_fails_those_behind_it_and_later_ones_go_on(raw: Raw, run: str) -> None:
    raw.result(raw.optim(run, 1))
    behind = [raw.optim(run, 3), raw.forward_backward(run, 4), raw.optim(run, 7)]
    started = time.monotonic()
    for request_id in behind:
        failure = raw.result(request_id)
        assert failure["category"] == "user"
        assert "seq_id 2 of this training run never arrived" in failure["error"]
    assert GAP * 0.5 < time.monotonic() - started < GAP + 3
    assert "error" not in raw.result(raw.optim(run, 8))
    late = raw.result(raw.optim(run, 2))
    assert "came after its turn" in late["error"]
    assert "error" not in raw.result(raw.optim(run, 9))


def test_every_arrival_gives_a_gap_more_time(raw: Raw, run: str) -> None:
    waiting = [raw.optim(run, 2)]
    for seq_id in range(3, 7):
        time.sleep(GAP * 0.4)
        waiting.append(raw.optim(run, seq_id))
    raw.optim(run, 1)
    assert all("error" not in raw.result(request_id) for request_id in waiting)


def test_a_refused_request_counts_as_arrived_even_out_of_order(raw: Raw, run: str) -> None:
    refused = raw.optim(run, 2, beta1=5)
    after = raw.optim(run, 3)
    assert "beta1" in raw.result(refused)["error"]
    assert raw.retrieve(after).status_code == 408
    raw.optim(run, 1)
    assert "error" not in raw.result(after)


def test_a_number_beyond_all_measure_is_only_a_gap(raw: Raw, run: str) -> None:
    far = raw.optim(run, 2**62)
    assert "never arrived" in raw.result(far)["error"]
    assert "error" not in raw.result(raw.optim(run, 2**62 + 1))


def test_runs_do_not_wait_for_each_other(raw: Raw) -> None:
    session = raw.session()
    stuck, free = raw.run(session, 0), raw.run(session, 1)
    raw.optim(stuck, 2)
    assert "error" not in raw.result(raw.optim(free, 1), 5.0)


def test_hundreds_of_requests_in_reverse_order(raw: Raw, run: str) -> None:
    request_ids = [raw.optim(run, seq_id) for seq_id in range(200, 0, -1)]
    assert all("error" not in raw.result(request_id) for request_id in request_ids)


def test_large_bodies_and_results_live_in_the_blob_store(make_server: Callable[..., Server]) -> None:
    server = make_server().start()
    raw = server.raw()
    run = raw.run(raw.session())
    body = training_body(run, 1, (400,) * 60)
    assert len(body) > 128 * 1024
    request_id = raw.forward_backward(run, 1, body, zstd=False)
    result = raw.result(request_id)
    assert len(result["protobuf"]) > 64 * 1024
    blobs = server.data / "blobs"
    assert [path.read_bytes() for path in (blobs / "bodies").iterdir()] == [body]
    wait_for(lambda: list(blobs.glob("results/*")), what="the result to be written")
    assert [path.read_bytes() for path in (blobs / "results").iterdir()] == [result["protobuf"]]
    assert raw.result(request_id) == result
