"""The official SDK, unmodified, against a real server."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator

import pytest
import tinker
from tinker import types

from tests.harness import KEY, MODEL, Server, datum


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[tinker.ServiceClient]:
    with server.sdk() as client:
        yield client


@pytest.fixture
def training(client: tinker.ServiceClient) -> tinker.TrainingClient:
    return client.create_lora_training_client(MODEL, rank=4, seed=1).result()


PROMPT = types.ModelInput.from_ints([1, 2, 3, 4])


def test_the_server_names_its_models(server: Server) -> None:
    rest = tinker.RestClient(base_url=server.url, api_key=KEY)
    models = rest.get_server_capabilities().result().supported_models
    assert [model.model_name for model in models] == [MODEL]
    assert models[0].max_context_length == 512
    assert models[0].trainable
    assert models[0].sampleable
    (more,) = server.raw().get("get_server_capabilities").json()["supported_models"]
    assert (more["architecture"], more["path"], more["max_rank"]) == ("Qwen3ForCausalLM", "packed", 128)
    assert more["why_no_images"] == "this model takes encoded text only"


def test_info_gives_a_tokenizer_that_loads_from_this_machine(training: tinker.TrainingClient) -> None:
    info = training.get_info()
    assert (info.model_data.model_name, info.is_lora, info.lora_rank) == (MODEL, True, 4)
    assert training.get_tokenizer().encode("a")


def test_a_step_of_training_lowers_the_loss(training: tinker.TrainingClient) -> None:
    losses = []
    for _ in range(3):
        result = training.forward_backward([datum(12), datum(9, 50)], "cross_entropy")
        step = training.optim_step(types.AdamParams(learning_rate=1e-2))
        losses.append(result.result().metrics["loss:sum"])
        step.result()
    assert losses[2] < losses[1] < losses[0]


def test_outputs_have_the_shapes_of_their_datums(training: tinker.TrainingClient) -> None:
    result = training.forward([datum(7), datum(5)], "cross_entropy").result()
    assert [output["logprobs"].shape for output in result.loss_fn_outputs] == [[7], [5]]


def test_cross_entropy_tells_the_loss_of_every_target(training: tinker.TrainingClient) -> None:
    weights = types.TensorData(data=[0.0, 0.0, 0.5, 1.0, 2.0], dtype="float32")
    result = training.forward([datum(5, weights=weights), datum(7)], "cross_entropy").result()
    assert result.loss_fn_output_type == "CrossEntropyLossReturn"
    first, second = ({k: v.to_numpy() for k, v in each.items()} for each in result.loss_fn_outputs)
    assert first["elementwise_loss"].tolist() == (-first["logprobs"] * weights.to_numpy()).tolist()
    assert second["elementwise_loss"].tolist() == (-second["logprobs"]).tolist()
    total = sum(float(each["elementwise_loss"].sum()) for each in (first, second))
    assert result.metrics["loss:sum"] == pytest.approx(total)


def test_forward_leaves_nothing_behind(training: tinker.TrainingClient) -> None:
    before = training.forward([datum()], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1.0)).result()
    after = training.forward([datum()], "cross_entropy").result()
    assert before.metrics == after.metrics


def test_a_call_of_many_chunks_comes_back_in_order(training: tinker.TrainingClient) -> None:
    data = [datum(3 + i % 5, i % 200) for i in range(2100)]
    result = training.forward(data, "cross_entropy").result()
    assert [output["logprobs"].shape for output in result.loss_fn_outputs] == [
        [3 + i % 5] for i in range(2100)
    ]


def test_a_custom_loss_runs_on_the_client(training: tinker.TrainingClient) -> None:
    def loss(data, logprobs):  # type: ignore[no-untyped-def]
        total = -sum(each.sum() for each in logprobs)
        return total, {"total:sum": total.item()}

    result = training.forward_backward_custom([datum(), datum(5)], loss).result()
    assert result.metrics["total:sum"] > 0
    training.optim_step(types.AdamParams()).result()


def test_saved_weights_can_be_sampled_from(
    client: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    path = training.save_weights_for_sampler("first").result().path
    assert path == f"tinker://{training.model_id}/sampler_weights/first"
    sampler = client.create_sampling_client(model_path=path).result()
    params = types.SamplingParams(max_tokens=5, seed=3, stop=[])
    answer = sampler.sample(PROMPT, 2, params).result()
    assert [len(sequence.tokens) for sequence in answer.sequences] == [5, 5]
    assert len({sequence.sequence_id for sequence in answer.sequences}) == 2


def test_unnamed_weights_can_be_sampled_from_at_once(training: tinker.TrainingClient) -> None:
    sampler = training.save_weights_and_get_sampling_client().result()
    answer = sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=3, stop=[])).result()
    assert len(answer.sequences[0].tokens) == 3


def test_a_sampler_does_not_change_when_training_goes_on(training: tinker.TrainingClient) -> None:
    sampler = training.save_weights_and_get_sampling_client().result()
    before = sampler.compute_logprobs(PROMPT).result()
    training.forward_backward([datum(20)], "cross_entropy")
    training.optim_step(types.AdamParams(learning_rate=0.1)).result()
    assert sampler.compute_logprobs(PROMPT).result() == before
    changed = training.save_weights_and_get_sampling_client().result().compute_logprobs(PROMPT).result()
    assert changed != before


def test_the_base_model_can_be_sampled_from(client: tinker.ServiceClient) -> None:
    sampler = client.create_sampling_client(base_model=MODEL).result()
    logprobs = sampler.compute_logprobs(PROMPT).result()
    assert logprobs[0] is None
    assert all(logprob < 0 for logprob in logprobs[1:])


def test_hundreds_of_samples_at_once(client: tinker.ServiceClient) -> None:
    sampler = client.create_sampling_client(base_model=MODEL).result()
    params = types.SamplingParams(max_tokens=2, stop=[])
    futures = [sampler.sample(PROMPT, 1, params) for _ in range(300)]
    assert all(len(future.result().sequences[0].tokens) == 2 for future in futures)


def _sample_elsewhere(sampler: tinker.SamplingClient, answers: multiprocessing.Queue[object]) -> None:
    params = types.SamplingParams(max_tokens=4, seed=7, stop=[])
    answers.put(list(sampler.sample(PROMPT, 1, params).result().sequences[0].tokens))


def test_a_pickled_sampling_client_works_in_another_process(client: tinker.ServiceClient) -> None:
    sampler = client.create_sampling_client(base_model=MODEL).result()
    here = sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=4, seed=7, stop=[])).result()
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    worker = spawn.Process(target=_sample_elsewhere, args=(sampler, answers))
    worker.start()
    assert answers.get(timeout=60) == list(here.sequences[0].tokens)
    worker.join(20)
    assert worker.exitcode in (0, -signal.SIGABRT)  # see harness.exit_code: it has said all that it had to


def _logprobs(training: tinker.TrainingClient) -> list[float]:
    output = training.forward([datum(10)], "cross_entropy").result().loss_fn_outputs[0]
    return [float(value) for value in output["logprobs"].data]


def _train(training: tinker.TrainingClient, steps: int = 1) -> None:
    for _ in range(steps):
        training.forward_backward([datum(10)], "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()


def test_a_state_with_its_optimizer_goes_on_as_if_nothing_had_happened(
    client: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    _train(training, 2)
    path = training.save_state("state").result().path
    again = client.create_training_client_from_state_with_optimizer(path).result()
    assert again.get_info().lora_rank == 4
    assert _logprobs(again) == _logprobs(training)
    _train(training)
    _train(again)
    assert _logprobs(again) == _logprobs(training)


def test_a_state_without_its_optimizer_starts_the_moments_anew(
    client: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    _train(training, 2)
    path = training.save_state("state").result().path
    again = client.create_training_client_from_state(path).result()
    assert _logprobs(again) == _logprobs(training)
    _train(training)
    _train(again)
    assert _logprobs(again) != _logprobs(training)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_can_load_one_of_its_own_states(training: tinker.TrainingClient) -> None:
    path = training.save_state("before").result().path
    before = _logprobs(training)
    _train(training)
    assert _logprobs(training) != before
    assert training.load_state(path).result().path == path
    assert _logprobs(training) == before


def test_a_refused_request_uses_up_its_place_and_the_next_one_works(training: tinker.TrainingClient) -> None:
    before = _logprobs(training)
    with pytest.raises(tinker.RequestFailedError, match="no_such_loss"):
        training.forward_backward([datum()], "no_such_loss").result()  # type: ignore[arg-type]
    assert _logprobs(training) == before
    _train(training)


def test_a_refused_call_of_many_chunks_does_not_hang(training: tinker.TrainingClient) -> None:
    with pytest.raises(tinker.RequestFailedError, match="no_such_loss"):
        training.forward_backward([datum(3)] * 2100, "no_such_loss").result(timeout=60)  # type: ignore[arg-type]
    _train(training)


def test_other_chunks_of_a_refused_call_stay_accumulated_and_a_pipelined_step_runs(
    training: tinker.TrainingClient,
) -> None:
    before = _logprobs(training)
    bad = datum(3, weights=types.TensorData(data=[float("nan")] * 3, dtype="float32"))
    failed = training.forward_backward([bad] + [datum(3)] * 1500, "cross_entropy")
    step = training.optim_step(types.AdamParams(learning_rate=1e-2))
    with pytest.raises(tinker.RequestFailedError):
        failed.result(timeout=60)
    step.result(timeout=60)
    assert _logprobs(training) != before


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": -0.1}, "beta2"),
        ({"eps": -1e-9}, "eps"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"grad_clip_norm": -1.0}, "grad_clip_norm"),
    ],
)
def test_optimizer_parameters_that_make_no_sense_are_refused_by_name(
    training: tinker.TrainingClient, params: dict[str, float], says: str
) -> None:
    with pytest.raises(tinker.RequestFailedError, match=says):
        training.optim_step(types.AdamParams(**params)).result()
    training.optim_step(types.AdamParams()).result()


def test_another_optimizer_than_the_runs_own_is_refused_at_a_step(training: tinker.TrainingClient) -> None:
    with pytest.raises(tinker.RequestFailedError, match="dimuon"):
        training.optim_step(types.DimuonParams(learning_rate=0.1)).result()


@pytest.mark.parametrize("name", ["../escape", "..", "a/b", "", "x" * 10_000, "nul\0byte", "/etc/passwd"])
def test_a_name_that_is_none_is_refused_and_nothing_is_retried(
    training: tinker.TrainingClient, name: str
) -> None:
    started = time.monotonic()
    for save in (training.save_state, training.save_weights_for_sampler):
        with pytest.raises(tinker.RequestFailedError, match="path"):
            save(name).result()
    assert time.monotonic() - started < 5
    training.optim_step(types.AdamParams()).result()


def test_a_name_that_exists_is_refused_at_once(training: tinker.TrainingClient) -> None:
    training.save_state("taken").result()
    training.save_weights_for_sampler("taken").result()
    started = time.monotonic()
    for save in (training.save_state, training.save_weights_for_sampler):
        with pytest.raises(tinker.RequestFailedError, match="exists"):
            save("taken").result()
    assert time.monotonic() - started < 5


def test_two_saves_of_one_name_at_once_make_one_checkpoint(training: tinker.TrainingClient) -> None:
    first, second = training.save_state("twice"), training.save_state("twice")
    assert first.result().path.endswith("/twice")
    with pytest.raises(tinker.RequestFailedError, match="exists"):
        second.result()


def test_overwriting_replaces_a_checkpoint(
    client: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    path = training.save_state("again").result().path
    _train(training)
    assert training.save_state("again", overwrite=True).result().path == path
    loaded = client.create_training_client_from_state(path).result()
    assert _logprobs(loaded) == _logprobs(training)


@pytest.mark.parametrize("ttl", [0, -5, 3599, 11 * 365 * 24 * 3600])
def test_a_time_to_live_out_of_range_is_refused(training: tinker.TrainingClient, ttl: int) -> None:
    with pytest.raises(tinker.RequestFailedError, match="ttl_seconds"):
        training.save_state("brief", ttl_seconds=ttl).result()


def test_a_checkpoint_keeps_its_time_to_live_and_metadata(
    server: Server, training: tinker.TrainingClient
) -> None:
    training.save_state("kept", ttl_seconds=3600, user_metadata={"step": "1"}).result()
    rest = tinker.RestClient(base_url=server.url, api_key=KEY)
    (checkpoint,) = rest.list_checkpoints(training.model_id).result().checkpoints
    assert checkpoint.user_metadata == {"step": "1"}
    assert checkpoint.expires_at is not None
    assert 3500 < (checkpoint.expires_at - checkpoint.time).total_seconds() <= 3600


def test_a_sessions_id_lists_the_checkpoints_of_all_its_runs(server: Server) -> None:
    """As Tinker's tutorial on weights asks: with what stands before the colon in a run's id."""
    rest = tinker.RestClient(base_url=server.url, api_key=KEY)
    with server.sdk() as client:
        first, second = (client.create_lora_training_client(MODEL, rank=2).result() for _ in range(2))
        paths = [
            first.save_state("a").result().path,
            second.save_state("b").result().path,
            first.save_weights_for_sampler("c").result().path,
        ]
        session = first.model_id.partition(":")[0]
        found = rest.list_checkpoints(session).result().checkpoints
    assert [each.tinker_path for each in found] == paths
    with pytest.raises(tinker.NotFoundError, match="no training run 'nobody'"):
        rest.list_checkpoints("nobody").result()


@pytest.mark.parametrize("rank", [0, -1, 129])
def test_a_rank_out_of_range_is_refused_at_once(client: tinker.ServiceClient, rank: int) -> None:
    with pytest.raises(tinker.RequestFailedError, match="rank"):
        client.create_lora_training_client(MODEL, rank=rank).result()


def test_an_unknown_model_is_refused_at_once_and_the_answer_names_those_served(
    client: tinker.ServiceClient,
) -> None:
    started = time.monotonic()
    with pytest.raises(tinker.NotFoundError, match=MODEL):
        client.create_lora_training_client("no/such-model").result()
    with pytest.raises(tinker.NotFoundError, match=MODEL):
        client.create_sampling_client(base_model="no/such-model").result()
    assert time.monotonic() - started < 5


def test_an_unknown_checkpoint_is_refused_at_once(client: tinker.ServiceClient) -> None:
    started = time.monotonic()
    with pytest.raises(tinker.RequestFailedError, match="no checkpoint"):
        client.create_training_client_from_state("tinker://no-run/weights/none").result()
    with pytest.raises(tinker.NotFoundError, match="no checkpoint"):
        client.create_sampling_client(model_path="tinker://no-run/sampler_weights/none").result()
    assert time.monotonic() - started < 5


def test_a_prompt_beyond_the_context_is_refused_with_the_three_numbers(client: tinker.ServiceClient) -> None:
    sampler = client.create_sampling_client(base_model=MODEL).result()
    prompt = types.ModelInput.from_ints([1] * 500)
    with pytest.raises(tinker.BadRequestError, match=r"500 .* 13,.* 512"):
        sampler.sample(prompt, 1, types.SamplingParams(max_tokens=13)).result()


def test_an_image_in_a_prompt_is_refused(client: tinker.ServiceClient) -> None:
    sampler = client.create_sampling_client(base_model=MODEL).result()
    prompt = types.ModelInput(chunks=[types.ImageChunk(data=b"png", format="png", expected_tokens=4)])
    with pytest.raises(tinker.BadRequestError, match="image"):
        sampler.sample(prompt, 1, types.SamplingParams(max_tokens=1)).result()


def test_the_rest_client_sees_runs_checkpoints_samplers_and_sessions(
    server: Server, client: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    state = training.save_state("seen").result().path
    weights = training.save_weights_for_sampler("seen").result().path
    sampler = client.create_sampling_client(model_path=weights).result()
    rest = tinker.RestClient(base_url=server.url, api_key=KEY)

    run = rest.get_training_run(training.model_id).result()
    assert (run.base_model, run.lora_rank, run.is_lora) == (MODEL, 4, True)
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.tinker_path == state
    assert run.last_sampler_checkpoint is not None
    assert run.last_sampler_checkpoint.tinker_path == weights
    listed = rest.list_training_runs(limit=1).result()
    assert listed.training_runs[0].training_run_id == training.model_id
    assert listed.cursor.total_count > 1

    kinds = {item.checkpoint_id for item in rest.list_checkpoints(training.model_id).result().checkpoints}
    assert kinds == {"weights/seen", "sampler_weights/seen"}
    assert rest.list_user_checkpoints(limit=1).result().cursor.total_count >= 2
    info = rest.get_weights_info_by_tinker_path(state).result()
    assert (info.base_model, info.lora_rank, info.train_mlp) == (MODEL, 4, True)
    seen = rest.get_sampler(sampler._sampling_session_id).result()
    assert (seen.base_model, seen.model_path) == (MODEL, weights)
    session_id = training.model_id.partition(":")[0]
    assert training.model_id in rest.get_session(session_id).result().training_run_ids
    assert session_id in rest.list_sessions().result().sessions


def test_a_checkpoint_can_be_deleted_and_its_name_used_again(
    server: Server, training: tinker.TrainingClient
) -> None:
    rest = tinker.RestClient(base_url=server.url, api_key=KEY)
    training.save_state("gone").result()
    rest.set_checkpoint_ttl_from_tinker_path(f"tinker://{training.model_id}/weights/gone", 7200).result()
    rest.delete_checkpoint(training.model_id, "weights/gone").result()
    assert rest.list_checkpoints(training.model_id).result().checkpoints == []
    training.save_state("gone").result()


def test_leaving_the_client_finishes_its_session(server: Server) -> None:
    with server.sdk() as client:
        session_id = client.holder.get_session_id()
    assert server.raw().post("session_heartbeat", {"session_id": session_id}).status_code == 410
