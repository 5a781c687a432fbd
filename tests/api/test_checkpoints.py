"""Checkpoints after they were saved: publishing, copies, lifetimes. With the official SDK."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tinker
from tinker import types

from tests.harness import KEY, MODEL, Server, datum, detail, wait_for

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


# Copies


def test_a_copy_shares_nothing_but_its_content(
    server: Server, client: tinker.ServiceClient, training: tinker.TrainingClient, rest: tinker.RestClient
) -> None:
    path = training.save_state("to-copy", ttl_seconds=7200, user_metadata={"a": "b"}).result().path
    copied = rest.copy_weights(path, "Default").result(timeout=10)
    run, _, name = copied.removeprefix("tinker://").partition("/")
    assert (run != training.model_id, name) == (True, "weights/to-copy")
    (row,) = rest.list_checkpoints(run).result().checkpoints
    assert (row.expires_at, row.public, row.user_metadata) == (None, False, {"a": "b"})
    assert rest.get_training_run(run).result().corrupted is False
    refused = server.raw().result(server.raw().optim(run, 1))
    assert "cannot be trained on" in refused["error"]
    # The source goes; the copy stays, with its files.
    rest.delete_checkpoint_from_tinker_path(path).result()
    again = client.create_training_client_from_state_with_optimizer(copied).result()
    assert logprobs(again) == logprobs(training)
    folder = server.data / "blobs" / "checkpoints"
    before = len(list(folder.iterdir()))
    rest.delete_checkpoint_from_tinker_path(copied).result()
    wait_for(lambda: len(list(folder.iterdir())) == before - 1, what="the files to go with the last of them")


def test_sampler_weights_are_copied_too_and_expire_when_told(
    client: tinker.ServiceClient, training: tinker.TrainingClient, rest: tinker.RestClient
) -> None:
    path = training.save_weights_for_sampler("to-copy").result().path
    copied = rest.copy_weights(path, "Default", ttl_seconds=3600).result(timeout=10)
    (row,) = rest.list_checkpoints(copied.split("/")[2]).result().checkpoints
    assert row.expires_at is not None
    answers = [
        client.create_sampling_client(model_path=each).result().compute_logprobs(PROMPT).result()
        for each in (path, copied)
    ]
    assert answers[0] == answers[1]


def test_one_key_makes_one_copy(server: Server, training: tinker.TrainingClient) -> None:
    raw = server.raw()
    paths = [training.save_state(f"once-{i}").result().path for i in range(2)]
    body = {"source_path": paths[0], "destination_project_id": "Default"}
    headers = {"X-Idempotency-Key": "the-key"}
    first, again = (raw.post("copy_weights", body, headers=headers).json()["tinker_path"] for _ in range(2))
    assert first == again
    assert raw.ok("copy_weights", body)["tinker_path"] != first
    other = raw.post("copy_weights", {**body, "source_path": paths[1]}, headers=headers)
    assert (other.status_code, "X-Idempotency-Key" in detail(other)) == (400, True)
    # A place in a session is a key as well.
    session = raw.session()
    body = {"source_path": paths[0], "session_id": session, "model_seq_id": 3}
    first, again = (raw.ok("copy_weights", body)["tinker_path"] for _ in range(2))
    assert first == again == f"tinker://{session}:train:3/weights/once-0"
    taken = raw.post("copy_weights", {**body, "source_path": paths[1]})
    assert (taken.status_code, "model_seq_id" in detail(taken)) == (400, True)


def test_who_may_copy_is_who_may_read(
    training: tinker.TrainingClient, rest: tinker.RestClient, strange_rest: tinker.RestClient
) -> None:
    path = training.save_state("guarded").result().path
    with pytest.raises(tinker.NotFoundError, match="source_path"):
        strange_rest.copy_weights(path, "Default").result(timeout=10)
    with pytest.raises(tinker.BadRequestError, match="weights_access_token"):
        strange_rest.copy_weights(path, "Default", weights_access_token="tml-no").result(timeout=10)
    by_token = strange_rest.copy_weights(path, "Default", weights_access_token=KEY).result(timeout=10)
    rest.publish_checkpoint_from_tinker_path(path).result()
    published = strange_rest.copy_weights(path, "Default").result(timeout=10)
    listed = {each.tinker_path for each in strange_rest.list_user_checkpoints().result().checkpoints}
    assert {by_token, published} <= listed
    with pytest.raises(tinker.NotFoundError):
        rest.get_weights_info_by_tinker_path(by_token).result()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"source_path": "nonsense"}, "source_path"),
        ({"source_path": None}, "source_path"),
        ({"destination_project_id": None}, "destination_project_id"),
        ({"destination_project_id": "none"}, "destination_project_id"),
        ({"session_id": "x"}, "destination_project_id"),
        ({"destination_project_id": None, "session_id": "none", "model_seq_id": 0}, "session_id"),
        ({"destination_project_id": None, "session_id": "none"}, "model_seq_id"),
        ({"ttl_seconds": 5}, "ttl_seconds"),
    ],
)
def test_a_copy_that_cannot_be_is_refused_by_name(
    server: Server, training: tinker.TrainingClient, change: dict[str, object], says: str
) -> None:
    path = training.save_state("refused", overwrite=True).result().path
    body = {"source_path": path, "destination_project_id": "Default", **change}
    answer = server.raw().post("copy_weights", body)
    assert answer.status_code in (400, 404)
    assert detail(answer).startswith(says)
