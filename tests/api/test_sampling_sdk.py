"""All that a sample request can carry, by the official SDK: answered in the shapes that it decodes."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.harness import KEY, MODEL, Server, datum, wait_for

TOKENS = [(7 * i) % 256 for i in range(100)]
PROMPT = types.ModelInput.from_ints(TOKENS)
ONE = types.SamplingParams(max_tokens=1)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[tinker.ServiceClient]:
    with server.sdk() as client:
        yield client


@pytest.fixture(scope="module")
def sampler(client: tinker.ServiceClient) -> tinker.SamplingClient:
    return client.create_sampling_client(base_model=MODEL).result()


def test_target_logprobs_of_the_prompts_own_tokens_are_its_logprobs(sampler: tinker.SamplingClient) -> None:
    ids = torch.tensor(TOKENS[1:])[:, None]
    both = torch.cat([ids, torch.full_like(ids, -1)], 1)
    target = types.TensorData.from_torch(both)
    result = sampler.sample(
        PROMPT, 1, ONE, include_prompt_logprobs=True, target_prompt_logprobs=target
    ).result()
    assert result.target_prompt_logprobs is not None
    found = result.target_prompt_logprobs.to_torch()
    assert found.shape == (99, 2)
    assert found[:, 0].tolist() == result.prompt_logprobs[1:]
    assert (found[:, 1] == 0.0).all()


def test_a_sparse_target_is_answered_sparse(sampler: tinker.SamplingClient) -> None:
    """The example of the SDK's own documentation: one candidate at the last position."""
    ids = torch.full((99, 4), -1)
    ids[98, 0] = TOKENS[-1]
    target = types.TensorData.from_torch_sparse(ids, pad_value=-1)
    assert target.sparse_crow_indices is not None
    result = sampler.sample(
        PROMPT, 1, ONE, include_prompt_logprobs=True, target_prompt_logprobs=target
    ).result()
    answer = result.target_prompt_logprobs
    assert answer is not None
    assert answer.sparse_crow_indices == target.sparse_crow_indices
    assert answer.sparse_col_indices == target.sparse_col_indices
    assert answer.shape == [99, 4]
    assert answer.to_torch()[98, 0].item() == result.prompt_logprobs[99]


def test_alternative_tokens(sampler: tinker.SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=1, temperature=1.0, seed=3)
    result = sampler.sample(PROMPT, 1, params, prompt_alt_tokens_k=4).result()
    drawn = result.prompt_alt_tokens
    assert drawn is not None
    assert (drawn.tokens.dtype, drawn.logprobs.dtype) == ("int64", "float32")
    tokens, logprobs = drawn.tokens.to_torch(), drawn.logprobs.to_torch()
    assert tokens.shape == logprobs.shape == (99, 4)
    scored = sampler.sample(
        PROMPT, 1, ONE, target_prompt_logprobs=types.TensorData.from_torch(tokens)
    ).result()
    assert scored.target_prompt_logprobs is not None
    assert torch.equal(scored.target_prompt_logprobs.to_torch(), logprobs)


def test_logprobs_of_the_last_tokens_alone(sampler: tinker.SamplingClient) -> None:
    whole = sampler.compute_logprobs(PROMPT).result()
    last = sampler.compute_logprobs(PROMPT, prompt_logprobs_last_n=10).result()
    assert last == [None] * 90 + whole[90:]
    result = sampler.sample(
        PROMPT, 1, ONE, include_prompt_logprobs=True, topk_prompt_logprobs=2, prompt_logprobs_last_n=10
    ).result()
    assert result.prompt_cache_hit_tokens == 64
    assert result.topk_prompt_logprobs is not None
    assert result.topk_prompt_logprobs[:90] == [None] * 90
    assert all(row is not None and len(row) == 2 for row in result.topk_prompt_logprobs[90:])


def test_top_k_of_the_prompt_and_of_what_is_sampled(sampler: tinker.SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=5, temperature=0.0, stop=[])
    result = sampler.sample(PROMPT, 2, params, topk_prompt_logprobs=3, topk_sample_logprobs=3).result()
    assert result.topk_prompt_logprobs_np is not None
    assert result.topk_prompt_logprobs_np.token_ids.shape == (100, 3)
    assert result.topk_prompt_logprobs is not None
    assert result.topk_prompt_logprobs[0] is None
    assert result.prompt_logprobs is None
    for sequence in result.sequences:
        assert sequence.topk_logprobs is not None
        best = [row[0] for row in sequence.topk_logprobs if row]
        assert [token for token, _ in best] == sequence.tokens
        assert [logprob for _, logprob in best] == sequence.logprobs


def test_the_cache_is_counted_on_the_prompt_itself(sampler: tinker.SamplingClient) -> None:
    prompt = types.ModelInput.from_ints([3, *TOKENS])
    hits = [sampler.sample(prompt, 3, ONE).result().prompt_cache_hit_tokens for _ in range(2)]
    assert hits == [0, 64]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"target_prompt_logprobs": types.TensorData(data=[1, 2, 3], dtype="int64", shape=[3, 1])},
            "target_prompt_logprobs.*99",
        ),
        ({"prompt_logprobs_last_n": 100, "include_prompt_logprobs": True}, "prompt_logprobs_last_n.*99"),
    ],
)
def test_what_does_not_fit_the_prompt_is_refused_at_once(
    sampler: tinker.SamplingClient, options: dict[str, object], says: str
) -> None:
    with pytest.raises(tinker.BadRequestError, match=says):
        sampler.sample(PROMPT, 1, ONE, **options).result()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt_alt_tokens_k": 10**6}, "prompt_alt_tokens_k is 1000000"),
        (
            {
                "target_prompt_logprobs": types.TensorData(
                    data=np.full(99, 10**6), dtype="int64", shape=[99, 1]
                )
            },
            "target_prompt_logprobs contains 1000000",
        ),
        (
            {"target_prompt_logprobs": types.TensorData(data=np.full(99, -1), dtype="int64", shape=[99, 1])},
            "target_prompt_logprobs names no token",
        ),
    ],
)
def test_what_the_model_cannot_answer_fails_by_name(
    sampler: tinker.SamplingClient, options: dict[str, object], says: str
) -> None:
    with pytest.raises(tinker.RequestFailedError, match=says):
        sampler.sample(PROMPT, 1, ONE, **options).result()  # type: ignore[arg-type]


def test_clones_of_a_sampler_never_share_a_request(
    sampler: tinker.SamplingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By handle and by pickle, in this process: every clone is given its number by the server."""
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    handle = sampler.get_sampler_handle()
    clones = [tinker.SamplingClient.from_sampler_handle(handle) for _ in range(2)]
    clones.append(pickle.loads(pickle.dumps(sampler)))
    params = types.SamplingParams(max_tokens=4, seed=11, stop=[])
    answers = [clone.sample(PROMPT, 1, params).result().sequences[0] for clone in (sampler, *clones)]
    assert len({tuple(answer.tokens) for answer in answers}) == 1
    assert len({answer.sequence_id for answer in answers}) == 4
    numbers = [clone._cloned_sampler_id for clone in clones]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) == 3
    assert max(numbers) < 10**6, "random ones, by the client itself"
    assert clones[0].get_base_model() == MODEL


def test_an_abandoned_sample_stops(hardy: Server) -> None:
    """The SDK sends cancel_future for a future that was cancelled, and the engine drops its sequences."""
    with hardy.sdk() as client:
        sampler = client.create_sampling_client(base_model=MODEL).result()
        future = sampler.sample(PROMPT, 64, types.SamplingParams(max_tokens=400, stop=[]))

        def pending() -> int:
            return int(hardy.raw().get("status").json()["engine"]["samples_pending"])

        wait_for(lambda: pending() > 0, what="the sample to begin")
        assert future.future().cancel()
        wait_for(lambda: pending() == 0, 5.0, "the sample to be dropped")


def test_a_long_context_id_names_its_model(client: tinker.ServiceClient) -> None:
    training = client.create_lora_training_client(f"{MODEL}:peft:256", rank=4).result()
    training.forward([datum()], "cross_entropy").result()
    assert training.get_tokenizer().encode("a")
    sampler = client.create_sampling_client(base_model=f"{MODEL}:peft:512").result()
    assert sampler.sample(PROMPT, 1, ONE).result().sequences
    path = training.save_state("long").result().path
    again = client.create_training_client_from_state(path, base_model=f"{MODEL}:peft:512").result()
    again.forward([datum()], "cross_entropy").result()


def test_inflight_samplers_of_a_run_share_its_newest_weights(client: tinker.ServiceClient) -> None:
    """Old and new ones alike; a snapshot taken beside them stays as it is."""
    training = client.create_lora_training_client(MODEL, rank=4, seed=1).result()

    def train() -> None:
        training.forward_backward([datum(12)], "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=0.1)).result()

    train()
    older = training.save_weights_and_get_sampling_client(kind="inflight").result()
    snapshot = training.save_weights_and_get_sampling_client().result()
    first = older.compute_logprobs(PROMPT).result()
    assert snapshot.compute_logprobs(PROMPT).result() == first
    train()
    newer = training.save_weights_and_get_sampling_client(kind="inflight").result()
    second = newer.compute_logprobs(PROMPT).result()
    assert second != first
    assert older.compute_logprobs(PROMPT).result() == second
    assert snapshot.compute_logprobs(PROMPT).result() == first
    assert older._sampling_session_id != newer._sampling_session_id


def test_a_sample_under_way_ends_on_the_weights_that_it_began_with_or_newer_ones(
    client: tinker.ServiceClient,
) -> None:
    training = client.create_lora_training_client(MODEL, rank=4, seed=2).result()
    sampler = training.save_weights_and_get_sampling_client(kind="inflight").result()
    future = sampler.sample(PROMPT, 4, types.SamplingParams(max_tokens=200, stop=[], seed=1))
    for _ in range(3):
        training.forward_backward([datum(12)], "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=0.1))
        training.save_weights_and_get_sampling_client(kind="inflight").result()
    assert [len(sequence.tokens) for sequence in future.result().sequences] == [200] * 4
