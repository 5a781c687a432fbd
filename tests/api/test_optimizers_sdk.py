"""Optimizers by the official SDK: fixed per run, reported, and kept in saved state."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tinker
from tinker import types
from tinker.types.optimizer import OptimizerConfigBase

from tests.harness import KEY, MODEL, Server, datum

DIMUON = types.DimuonOptimizerConfig()
STEP = types.DimuonParams(learning_rate=0.02)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[tinker.ServiceClient]:
    with server.sdk() as client:
        yield client


def create(
    client: tinker.ServiceClient, optimizer: types.OptimizerConfig | None = None
) -> tinker.TrainingClient:
    return client.create_lora_training_client(MODEL, rank=4, seed=1, optimizer=optimizer).result()


def train(training: tinker.TrainingClient, params: types.OptimParams, steps: int = 1) -> float:
    for _ in range(steps):
        result = training.forward_backward([datum(12), datum(9, 50)], "cross_entropy")
        training.optim_step(params).result()
    return float(result.result().metrics["loss:sum"])


def logprobs(training: tinker.TrainingClient) -> list[float]:
    outputs = training.forward([datum(30)], "cross_entropy").result().loss_fn_outputs
    return outputs[0]["logprobs"].data  # type: ignore[return-value]


def test_a_run_has_the_optimizer_that_it_was_created_with(
    server: Server, client: tinker.ServiceClient
) -> None:
    training = create(client, DIMUON)
    assert training.get_info().optimizer_config.model_dump() == {"type": "dimuon", "version": 1}
    assert create(client).get_info().optimizer_config == types.AdamOptimizerConfig()
    assert train(training, STEP, 5) < train(create(client), types.AdamParams(learning_rate=0.0))
    path = training.save_state("opt").result().path
    rest = tinker.RestClient(base_url=server.url, api_key=KEY)
    info = rest.get_weights_info_by_tinker_path(path).result()
    assert info.optimizer_config.model_dump() == {"type": "dimuon", "version": 1}


def test_a_step_of_another_family_is_refused_and_the_run_goes_on(client: tinker.ServiceClient) -> None:
    for optimizer, wrong, right in (
        (DIMUON, types.AdamParams(), STEP),
        (None, STEP, types.AdamParams(learning_rate=0.01)),
    ):
        training = create(client, optimizer)
        training.forward_backward([datum()], "cross_entropy").result()
        with pytest.raises(tinker.RequestFailedError, match="this run was created with the optimizer"):
            training.optim_step(wrong).result()
        assert training.optim_step(right).result().metrics


def test_state_with_its_optimizer_goes_on_as_if_nothing_had_been(client: tinker.ServiceClient) -> None:
    training = create(client, DIMUON)
    train(training, STEP, 2)
    path = training.save_state("half").result().path
    train(training, STEP, 2)
    again = client.create_training_client_from_state_with_optimizer(path).result()
    assert again.get_info().optimizer_config.type == "dimuon"
    train(again, STEP, 2)
    assert logprobs(again) == logprobs(training)


def test_weights_alone_may_go_on_with_another_optimizer(client: tinker.ServiceClient) -> None:
    training = create(client, DIMUON)
    train(training, STEP, 2)
    path = training.save_state("weights").result().path
    plain = client.create_training_client_from_state(path).result()
    assert plain.get_info().optimizer_config.type == "adamw"
    assert logprobs(plain) == logprobs(training)
    train(plain, types.AdamParams(learning_rate=0.01))
    path = plain.save_state("adamw").result().path
    other = client.create_training_client_from_state(path, optimizer=DIMUON).result()
    assert other.get_info().optimizer_config.type == "dimuon"
    train(other, STEP)


def test_state_of_another_optimizer_is_an_error_that_names_it(client: tinker.ServiceClient) -> None:
    training = create(client, DIMUON)
    train(training, STEP)
    path = training.save_state("mine").result().path
    fresh = create(client, DIMUON).save_state("no step yet").result().path
    adamw = create(client)
    for each in (path, fresh):
        with pytest.raises(
            tinker.RequestFailedError, match="state of the optimizer dimuon, this run was created with adamw"
        ):
            adamw.load_state_with_optimizer(each).result()
    adamw.load_state(path).result()
    assert logprobs(adamw) == logprobs(training)


def test_an_optimizer_that_is_not_offered_is_refused_by_name(client: tinker.ServiceClient) -> None:
    with pytest.raises(tinker.RequestFailedError, match="'lion' is not offered"):
        create(client, OptimizerConfigBase(type="lion"))


def test_it_survives_a_stop_bit_for_bit(hardy: Server) -> None:
    """The run is put away whole and brought back: moments, steps and the accumulated gradient."""
    client = tinker.ServiceClient(base_url=hardy.url, api_key=KEY)
    stopped, straight = create(client, DIMUON), create(client, DIMUON)
    for training in (stopped, straight):
        train(training, STEP, 2)
        training.forward_backward([datum(20)], "cross_entropy").result()
    straight.optim_step(STEP).result()
    expected = logprobs(straight)
    hardy.stop()
    hardy.start()
    stopped.optim_step(STEP).result()
    assert logprobs(stopped) == expected
    assert stopped.get_info().optimizer_config.type == "dimuon"
