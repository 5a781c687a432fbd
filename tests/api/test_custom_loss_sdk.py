"""Custom losses that run on the server, by the official SDK: create_custom_loss, then forward_backward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import tinker
import torch
from tinker import types

from tests.harness import KEY, MODEL, Raw, Server, datum


def clipped(logprobs: torch.Tensor, advantages: torch.Tensor, old: torch.Tensor):  # type: ignore[no-untyped-def]
    ratio = torch.exp(logprobs - old)
    inside = torch.clamp(ratio, 0.8, 1.2)
    loss = -torch.minimum(ratio * advantages, inside * advantages).sum() / math.sqrt(logprobs.shape[0])
    return loss, {"custom/clipped:mean": (ratio != inside).float().mean(), "custom/loss:sum": loss}


RANKS: Any = {"logprobs": 1, "advantages": 1, "old": 1}


def data(count: int) -> list[types.Datum]:
    made = []
    for i in range(count):
        n = 5 + i % 7
        extra = {
            "advantages": types.TensorData(data=[(-1.0) ** (i + j) for j in range(n)], dtype="float32"),
            "old": types.TensorData(data=[-5.0 - 0.1 * j for j in range(n)], dtype="float32"),
        }
        made.append(datum(n, i % 200, **extra))
    return made


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[tinker.ServiceClient]:
    with server.sdk() as client:
        yield client


@pytest.fixture(scope="module")
def handle(client: tinker.ServiceClient) -> Any:
    return client.create_custom_loss(clipped, RANKS).result()


def create(client: tinker.ServiceClient) -> tinker.TrainingClient:
    return client.create_lora_training_client(MODEL, rank=4, seed=1).result()


def logprobs(training: tinker.TrainingClient) -> Any:
    return training.forward([datum(30)], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data


@pytest.mark.parametrize("count", [3, 1100], ids=["one request", "two chunks"])
def test_it_is_what_the_client_would_have_computed(
    client: tinker.ServiceClient, handle: Any, count: int
) -> None:
    """The same loss, metrics and weights after a step, bit for bit; without the second pass."""
    assert handle.loss_id is not None, "the server has said that it runs them"

    def on_the_client(data, logprobs_list):  # type: ignore[no-untyped-def]
        from tinker.lib.public_interfaces.custom_loss import run_loss_handle

        return run_loss_handle(handle, data, logprobs_list)

    here, there = create(client), create(client)
    results = []
    for training, loss in ((here, handle), (there, on_the_client)):
        result = training.forward_backward_custom(data(count), loss)
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        results.append(result.result())
    mine, theirs = results
    assert mine.metrics.keys() == {"loss:sum", "custom/clipped:mean", "custom/loss:sum"}
    for key, value in mine.metrics.items():
        assert value == pytest.approx(theirs.metrics[key], rel=1e-4), key
    assert len(mine.loss_fn_outputs) == count
    for a, b in zip(mine.loss_fn_outputs, theirs.loss_fn_outputs, strict=True):
        assert a["logprobs"].data == b["logprobs"].data
    if count == 3:
        assert logprobs(here) == logprobs(there)


def test_a_loss_that_the_server_does_not_allow_is_refused_by_name(client: tinker.ServiceClient) -> None:
    def random(logprobs: torch.Tensor):  # type: ignore[no-untyped-def]
        return (logprobs * torch.rand_like(logprobs)).sum(), {}

    with pytest.raises(tinker.RequestFailedError, match=r"the function 'torch\.rand_like' is not allowed"):
        client.create_custom_loss(random, {"logprobs": 1}).result()
    with pytest.raises(tinker.RequestFailedError, match="no such custom loss"):
        create(client).forward_backward(data(1), "custom", {"loss_id": "nobody"}).result()  # type: ignore[arg-type]


def test_a_datum_that_it_cannot_take_fails_the_call_and_the_run_goes_on(
    client: tinker.ServiceClient, handle: Any
) -> None:
    training = create(client)
    short = types.TensorData(data=[1.0, 1.0], dtype="float32")
    wrong = [*data(1), datum(5, 0, advantages=short, old=short)]
    with pytest.raises(tinker.RequestFailedError, match=r"data\[1\]: custom loss 'clipped', node"):
        training.forward_backward_custom(wrong, handle).result()
    training.forward_backward_custom(data(2), handle).result()


def test_a_loss_belongs_to_its_session(server: Server, handle: Any) -> None:
    with server.sdk() as other:
        training = create(other)
        with pytest.raises(tinker.RequestFailedError, match="no such custom loss"):
            training.forward_backward(data(1), "custom", {"loss_id": handle.loss_id}).result()  # type: ignore[arg-type]


def test_a_loss_outlives_the_server(hardy: Server) -> None:
    client = tinker.ServiceClient(base_url=hardy.url, api_key=KEY)
    handle = client.create_custom_loss(clipped, RANKS).result()
    path = create(client).save_state("s").result().path
    hardy.kill()
    hardy.start()
    again = client.create_training_client_from_state(path).result()
    again.forward_backward_custom(data(2), handle).result()
    assert hardy.raw().result(handle.loss_id) == {"type": "create_custom_loss", "loss_id": handle.loss_id}
    lost = f"{client.holder.get_session_id()}:loss:7"
    assert "was kept" in hardy.raw().result(lost)["error"]


class TestRequests:
    """What the SDK would never send."""

    GRAPH: Any = {  # noqa: RUF012
        "nodes": [
            {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
            {"op": "call_function", "name": "s", "target": "torch.sum", "args": [{"ref": "logprobs"}]},
            {
                "op": "output",
                "name": "output",
                "target": "output",
                "args": [{"tuple": [{"ref": "s"}, {"dict": {}}]}],
            },
        ]
    }

    def body(self, session: str, place: object = 0, **more: object) -> dict[str, object]:
        inputs = [{"name": "logprobs", "rank": 1}]
        whole = {"session_id": session, "custom_loss_seq_id": place, "name": "l", "inputs": inputs}
        return {**whole, "graph": self.GRAPH, **more}

    def test_a_retry_finds_the_loss_and_another_place_is_another_loss(self, raw: Raw) -> None:
        session = raw.session()
        first = raw.ok("create_custom_loss", self.body(session))["request_id"]
        assert raw.ok("create_custom_loss", self.body(session))["request_id"] == first
        second = raw.ok("create_custom_loss", self.body(session, 1))["request_id"]
        assert raw.result(first)["loss_id"] != raw.result(second)["loss_id"]

    @pytest.mark.parametrize(
        ("more", "says"),
        [
            ({"session_id": "none"}, "session_id"),
            ({"session_id": None}, "session_id"),
            ({"custom_loss_seq_id": -1}, "custom_loss_seq_id"),
            ({"name": "x" * (1 << 20)}, "graph: the request has"),
        ],
    )
    def test_whose_it_is_must_be_known_at_once(self, raw: Raw, more: dict[str, object], says: str) -> None:
        answer = raw.post("create_custom_loss", self.body(raw.session(), **more))
        assert answer.status_code in (400, 404, 413)
        assert says in answer.json()["detail"]

    @pytest.mark.parametrize(
        ("more", "says"),
        [
            ({"name": None}, "name: is missing"),
            ({"graph": []}, "graph: must be a JSON object"),
            ({"inputs": {}}, "inputs: must be a JSON array"),
            (
                {"graph": {"nodes": [{"op": "call_module", "name": "m", "target": "m"}]}},
                "'call_module' is not",
            ),
        ],
    )
    def test_what_is_wrong_with_the_loss_comes_through_its_future(
        self, raw: Raw, more: dict[str, object], says: str
    ) -> None:
        result = raw.result(raw.ok("create_custom_loss", self.body(raw.session(), **more))["request_id"])
        assert says in result["error"]
        assert result["category"] == "user"

    def test_others_cannot_see_it(self, server: Server, raw: Raw) -> None:
        request = raw.ok("create_custom_loss", self.body(raw.session()))["request_id"]
        stranger = server.raw(server.new_key("stranger-to-losses"))
        assert stranger.retrieve(request).status_code == 404
        assert stranger.post("create_custom_loss", self.body(request.partition(":")[0])).status_code == 404

    def test_a_finished_session_takes_none(self, raw: Raw) -> None:
        session = raw.session()
        raw.ok(f"sessions/{session}/finish", {"reason": {"type": "success"}})
        assert raw.post("create_custom_loss", self.body(session)).status_code == 410
