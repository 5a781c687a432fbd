"""Training on recorded sequences by the official SDK, as the cookbook's loop does it."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tinker
from tinker import types

from tests.harness import KEY, MODEL, Raw, Server, wait_for

PROMPT = types.ModelInput.from_ints([1, 2, 3, 4, 5])
PARAMS = types.SamplingParams(max_tokens=6, stop=[], seed=1)
LOSS = "stable_reinforce"


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[tinker.ServiceClient]:
    with server.sdk() as client:
        yield client


def create(client: tinker.ServiceClient) -> tinker.TrainingClient:
    return client.create_lora_training_client(MODEL, rank=4, seed=1).result()


def sample(
    training: tinker.TrainingClient, count: int = 2, *, record: bool = True
) -> list[types.SampledSequence]:
    sampler = training.save_weights_and_get_sampling_client(record_stability_info=record).result()
    return list(sampler.sample(PROMPT, count, PARAMS).result().sequences)


def datum(sequence: types.SampledSequence, advantage: float = 1.0) -> types.Datum:
    """As tinker_cookbook.recipes.rl_loop builds it."""
    tokens, prompt = sequence.tokens, PROMPT.length
    return types.Datum(
        model_input=PROMPT.append(types.EncodedTextChunk(tokens=tokens[:-1])),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=[0] * (prompt - 1) + tokens, dtype="int64"),
            "logprobs": types.TensorData(
                data=[0.0] * (prompt - 1) + (sequence.logprobs or []), dtype="float32"
            ),
            "advantages": types.TensorData(
                data=[0.0] * (prompt - 1) + [advantage] * len(tokens), dtype="float32"
            ),
        },
    ).with_provenance(
        model_input=[
            types.PromptProvenanceSpan(sequence_id=sequence.sequence_id, length=prompt),
            types.SampledProvenanceSpan(sequence_id=sequence.sequence_id, length=len(tokens) - 1),
        ],
        loss_fn_inputs=[
            types.PromptProvenanceSpan(sequence_id=sequence.sequence_id, offset=1, length=prompt - 1),
            types.SampledProvenanceSpan(sequence_id=sequence.sequence_id, length=len(tokens)),
        ],
    )


def outputs(training: tinker.TrainingClient, data: list[types.Datum]) -> list[float]:
    """Each sampled sequence's logprob."""
    result = training.forward(data, LOSS).result()
    return [sum(output["logprobs"].data[PROMPT.length - 1 :]) for output in result.loss_fn_outputs]


def test_a_loop_makes_what_is_rewarded_more_likely(client: tinker.ServiceClient) -> None:
    training = create(client)
    good, bad = sample(training)
    data = [datum(good, 1.0), datum(bad, -1.0)]
    before = outputs(training, data)
    for _ in range(4):
        result = training.forward_backward(data, LOSS, {"kl_coeff": 0.01})
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        assert result.result().metrics.keys() == {"loss:sum"}
    after = outputs(training, data)
    assert after[0] > before[0] + 0.1
    assert after[1] < before[1] - 0.1


def test_the_datum_need_not_repeat_the_logprobs(client: tinker.ServiceClient) -> None:
    training = create(client)
    (sequence, _) = sample(training)
    whole = datum(sequence)
    less = dataclasses.replace(
        whole, loss_fn_inputs={k: v for k, v in whole.loss_fn_inputs.items() if k != "logprobs"}
    )
    config = {"kl_coeff": 1.0}
    losses = [training.forward([each], LOSS, config).result().metrics for each in (whole, less)]
    assert losses[0] == losses[1]


def test_what_was_not_recorded_is_refused_and_the_run_goes_on(client: tinker.ServiceClient) -> None:
    training = create(client)
    (plain, _) = sample(training, record=False)
    (recorded, _) = sample(training)
    with pytest.raises(tinker.RequestFailedError, match=r"data\[0\].*was not recorded in this session"):
        training.forward_backward([datum(plain)], LOSS).result()
    other = dataclasses.replace(plain, sequence_id=recorded.sequence_id, tokens_np=recorded.tokens_np[::-1])
    with pytest.raises(tinker.RequestFailedError, match=r"does not fit: .* was recorded there"):
        training.forward_backward([datum(other)], LOSS).result()
    training.forward_backward([datum(recorded)], LOSS).result()


def test_another_sessions_sequences_are_not_found(server: Server, client: tinker.ServiceClient) -> None:
    (theirs, _) = sample(create(client))
    with server.sdk() as mine, pytest.raises(tinker.RequestFailedError, match="not recorded in this session"):
        create(mine).forward_backward([datum(theirs)], LOSS).result()


def test_losses_that_do_not_build_on_provenance_take_it_along(client: tinker.ServiceClient) -> None:
    training = create(client)
    (plain, _) = sample(training, record=False)
    training.forward_backward([datum(plain)], "importance_sampling").result()


def test_a_custom_loss_of_the_client_takes_it_along_too(client: tinker.ServiceClient) -> None:
    training = create(client)
    (plain, _) = sample(training, record=False)

    def loss(data, logprobs):  # type: ignore[no-untyped-def]
        return -sum(each.sum() for each in logprobs), {}

    training.forward_backward_custom([datum(plain)], loss).result()


def test_recording_needs_a_session(raw: Raw) -> None:
    body = {"base_model": MODEL, "prompt": {"chunks": [{"tokens": [1]}]}, "record_stability_info": True}
    answer = raw.post("asample", body)
    assert answer.status_code == 400
    assert "record_stability_info: goes with a sampling_session_id" in answer.json()["detail"]


def files(server: Server) -> list[Path]:
    return sorted((server.data / "blobs" / "aside").glob("*/sample-*"))


def test_sequences_outlive_the_server_and_go_after_a_day(
    make_server: Callable[..., Server],
) -> None:
    server = make_server("--result-ttl", "2").start()
    client = tinker.ServiceClient(base_url=server.url, api_key=KEY)
    training = create(client)
    sampler = training.save_weights_and_get_sampling_client(record_stability_info=True).result()
    first, second = sampler.sample(PROMPT, 1, PARAMS).result(), sampler.sample(PROMPT, 1, PARAMS).result()
    path = training.save_state("before").result().path
    server.kill()
    server.start()
    again = client.create_training_client_from_state(path).result()
    again.forward_backward([datum(first.sequences[0])], LOSS).result()

    old = time.time() - 25 * 3600
    assert len(files(server)) == 2
    for file in files(server):
        os.utime(file, (old + 1800, old + 1800))  # 24.5 hours: expired, and not swept yet
    with pytest.raises(tinker.RequestFailedError, match=r"has expired: .* 24\.5 hours ago"):
        again.forward_backward([datum(second.sequences[0])], LOSS).result()
    os.utime(files(server)[0], (old - 60, old - 60))
    wait_for(lambda: len(files(server)) == 1, 20.0, "the expired file to be swept")
    client.holder.close()
    server.raw().ok(f"sessions/{client.holder.get_session_id()}/finish", {"reason": {"type": "success"}})
    wait_for(lambda: not files(server), 20.0, "the session's folder to go with the session")


def test_a_full_disk_fails_the_sample_and_nothing_else(hardy: Server) -> None:
    with hardy.sdk() as client:
        training = create(client)
        sampler = training.save_weights_and_get_sampling_client(record_stability_info=True).result()
        plain = client.create_sampling_client(base_model=MODEL).result()
        hardy.limit_file_size(64)
        with pytest.raises(tinker.RequestFailedError, match="could not be recorded"):
            sampler.sample(PROMPT, 1, PARAMS).result()
        assert plain.sample(PROMPT, 1, PARAMS).result().sequences
        hardy.limit_file_size(None)
        assert sampler.sample(PROMPT, 1, PARAMS).result().sequences
