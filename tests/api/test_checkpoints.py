"""Checkpoints after they were saved: publishing, copies, lifetimes. With the official SDK."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tinker
from tinker import types

from tests.harness import KEY, MODEL, Server, datum, detail

PROMPT = types.ModelInput.from_ints([1, 2, 3, 4])


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[tinker.ServiceClient]:
    with server.sdk() as client:
        yield client


@pytest.fixture(scope="module")
def training(client: tinker.ServiceClient) -> tinker.TrainingClient:
    """A run with something learned."""
    training = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
    training.forward_backward([datum(10)], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return training


@pytest.fixture(scope="module")
def rest(server: Server) -> tinker.RestClient:
    return tinker.RestClient(base_url=server.url, api_key=KEY)


@pytest.fixture(scope="module")
def stranger_key(server: Server) -> str:
    return server.new_key("a-stranger")


@pytest.fixture(scope="module")
def stranger(server: Server, stranger_key: str) -> Iterator[tinker.ServiceClient]:
    """Somebody of another organization."""
    with server.sdk(stranger_key) as client:
        yield client


@pytest.fixture(scope="module")
def strange_rest(server: Server, stranger_key: str) -> tinker.RestClient:
    return tinker.RestClient(base_url=server.url, api_key=stranger_key)


def logprobs(training: tinker.TrainingClient) -> list[float]:
    output = training.forward([datum(10)], "cross_entropy").result().loss_fn_outputs[0]
    return [float(value) for value in output["logprobs"].data]


# Publishing


def test_a_published_state_is_read_by_another_organization_and_listed_nowhere(
    training: tinker.TrainingClient,
    rest: tinker.RestClient,
    stranger: tinker.ServiceClient,
    strange_rest: tinker.RestClient,
) -> None:
    path = training.save_state("for-all").result().path
    with pytest.raises(tinker.NotFoundError):
        strange_rest.get_weights_info_by_tinker_path(path).result()
    rest.publish_checkpoint_from_tinker_path(path).result()
    (listed,) = [c for c in rest.list_checkpoints(training.model_id).result().checkpoints if c.public]
    assert listed.tinker_path == path
    info = strange_rest.get_weights_info_by_tinker_path(path).result()
    assert (info.base_model, info.lora_rank) == (MODEL, 4)
    assert strange_rest.list_user_checkpoints().result().checkpoints == []
    for hidden in (strange_rest.list_checkpoints, strange_rest.get_training_run):
        with pytest.raises(tinker.NotFoundError):
            hidden(training.model_id).result()
    theirs = stranger.create_training_client_from_state_with_optimizer(path).result()
    assert logprobs(theirs) == logprobs(training)
    sampler = stranger.create_sampling_client(model_path=path).result()
    ours = training.save_weights_and_get_sampling_client().result()
    assert sampler.compute_logprobs(PROMPT).result() == ours.compute_logprobs(PROMPT).result()


def test_what_is_published_can_be_changed_by_its_owner_alone(
    training: tinker.TrainingClient, rest: tinker.RestClient, strange_rest: tinker.RestClient
) -> None:
    path = training.save_weights_for_sampler("mine-alone").result().path
    rest.publish_checkpoint_from_tinker_path(path).result()
    for change in (
        strange_rest.publish_checkpoint_from_tinker_path(path),
        strange_rest.unpublish_checkpoint_from_tinker_path(path),
        strange_rest.delete_checkpoint_from_tinker_path(path),
        strange_rest.set_checkpoint_ttl_from_tinker_path(path, 3600),
    ):
        with pytest.raises(tinker.NotFoundError, match="there is no checkpoint"):
            change.result()


def test_publishing_twice_is_no_error_and_unpublishing_takes_it_back(
    training: tinker.TrainingClient, rest: tinker.RestClient, strange_rest: tinker.RestClient
) -> None:
    path = training.save_state("for-a-while").result().path
    for _ in range(2):
        rest.publish_checkpoint_from_tinker_path(path).result(timeout=10)
    assert strange_rest.get_weights_info_by_tinker_path(path).result().is_lora
    for _ in range(2):
        rest.unpublish_checkpoint_from_tinker_path(path).result(timeout=10)
    with pytest.raises(tinker.NotFoundError):
        strange_rest.get_weights_info_by_tinker_path(path).result()


def test_what_is_overwritten_is_private_again(
    training: tinker.TrainingClient, rest: tinker.RestClient, strange_rest: tinker.RestClient
) -> None:
    path = training.save_state("newer").result().path
    rest.publish_checkpoint_from_tinker_path(path).result()
    training.save_state("newer", overwrite=True).result()
    with pytest.raises(tinker.NotFoundError):
        strange_rest.get_weights_info_by_tinker_path(path).result()


def test_names_that_look_like_routes_are_names(
    server: Server, training: tinker.TrainingClient, rest: tinker.RestClient
) -> None:
    for name in ("publish", "ttl"):
        path = training.save_state(name).result().path
        rest.publish_checkpoint_from_tinker_path(path).result()
        rest.set_checkpoint_ttl_from_tinker_path(path, 3600).result()
        rest.unpublish_checkpoint_from_tinker_path(path).result()
        rest.delete_checkpoint_from_tinker_path(path).result()
        with pytest.raises(tinker.NotFoundError):
            rest.get_weights_info_by_tinker_path(path).result()


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_an_id_that_is_none_is_a_400(server: Server, training: tinker.TrainingClient, method: str) -> None:
    http = server.raw().http
    for bad in ("nonsense/x", "weights/a/b", "..%2F..%2Fetc"):
        answer = http.request(method, f"training_runs/{training.model_id}/checkpoints/{bad}/publish")
        assert (answer.status_code, "checkpoint_id" in detail(answer)) == (400, True)
