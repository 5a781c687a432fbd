"""A hundred calls as Tinker's documentation describes them, each with what it promises.

    TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-... python examples/hundred_calls.py

It knows nothing of the server but its address, and asks it for the model to use (the first, or MODEL). It
prints a line for every call and ends with 1 if one of them did not do as documented. A SamplingClient looks
for its tokenizer by the model's name: in a folder of that name where the script runs, or on the hub.
"""

# ruff: noqa: PT018
from __future__ import annotations

import asyncio
import json
import math
import os
import pickle
import subprocess
import sys
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import tinker
import torch
from documented import call, close, end, refused
from tinker import BadRequestError, NotFoundError, RequestFailedError, types

BASE = os.environ["TINKER_BASE_URL"].rstrip("/")
KEY = os.environ["TINKER_API_KEY"]
DAY = 24 * 3600
Ints, Params = types.ModelInput.from_ints, types.SamplingParams


def loss_of(client: tinker.TrainingClient) -> float:
    return client.forward([datum], "cross_entropy").result().metrics["loss:sum"]


def checkpoints() -> dict[str, tinker.Checkpoint]:
    """The run's, by their paths."""
    return {each.tinker_path: each for each in rest.list_checkpoints(info.model_id).result().checkpoints}


def sampled(client: tinker.SamplingClient, count: int = 1, **params: Any) -> Sequence[tinker.SampledSequence]:
    """Samples after the prompt."""
    return client.sample(prompt, count, Params(**{"max_tokens": 8, **params})).result().sequences


def text_datum(inputs: list[int], targets: list[int], weights: list[float] | None = None) -> types.Datum:
    of_loss = {"target_tokens": targets, "weights": weights or [1.0] * len(targets)}
    return types.Datum(model_input=Ints(inputs), loss_fn_inputs=of_loss)


def trained(
    *data: types.Datum, loss: Any = "cross_entropy", config: Any = None
) -> tinker.ForwardBackwardOutput:
    return run.forward_backward(list(data), loss, loss_fn_config=config).result()


def tensor(values: list[float]) -> types.TensorData:
    return types.TensorData.from_torch(torch.tensor(values, dtype=torch.float32))


# Finding one's way

service = tinker.ServiceClient(user_metadata={"script": "a hundred calls"})
rest = tinker.RestClient()
with call("get_server_capabilities names the models"):
    models = rest.get_server_capabilities().result().supported_models
    assert models and all(model.model_name for model in models)
    MODEL = os.environ.get("MODEL") or models[0].model_name or ""
    (CONTEXT,) = [each.max_context_length or 0 for each in models if each.model_name == MODEL]
    assert CONTEXT > 100
with call("whoami says whose key this is"):
    who = rest.whoami().result()
    assert who.user_urn and who.org_urn
with call("get_console_url is an address"):
    assert service.get_console_url().startswith("http")
with call("create_rest_client gives a RestClient of the same session"):
    assert isinstance(service.create_rest_client(), tinker.RestClient)
with call("another key is an AuthenticationError"):
    refused(lambda: tinker.RestClient(api_key="tml-nobody-has-this-key"), tinker.AuthenticationError, "401")

# A training run and its data

with call("create_lora_training_client"):
    purpose = {"purpose": "hundred"}
    run = service.create_lora_training_client(MODEL, rank=8, seed=7, user_metadata=purpose).result()
with call("get_info tells model, rank and tokenizer"):
    info = run.get_info()
    assert info.model_id and info.model_data.model_name == MODEL
    assert (info.is_lora, info.lora_rank) == (True, 8)
with call("get_tokenizer encodes and decodes"):
    tokenizer = run.get_tokenizer()
    words = tokenizer.encode("The weather today is fine, and better tomorrow.", add_special_tokens=False)
    assert tokenizer.decode(words).startswith("The weather")
    inputs, targets = words[:-1], words[1:]
    N = len(inputs)
    datum = text_datum(inputs, targets)
with call("forward gives logprobs in the targets' shape, and their negative sum as loss"):
    before = run.forward([datum], "cross_entropy").result()
    logprobs = before.loss_fn_outputs[0]["logprobs"].to_torch()
    assert logprobs.shape == (N,) and bool((logprobs <= 0).all())
    assert close(before.metrics["loss:sum"], -float(logprobs.sum()))
with call("forward has no effect"):
    again = run.forward([datum], "cross_entropy").result()
    assert torch.equal(again.loss_fn_outputs[0]["logprobs"].to_torch(), logprobs)
with call("forward_backward gives the same loss as forward"):
    out = trained(datum)
    assert close(out.metrics["loss:sum"], before.metrics["loss:sum"])
with call("optim_step changes the weights"):
    run.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    assert loss_of(run) != out.metrics["loss:sum"]
with call("ten steps submitted at once lower the loss"):
    futures = []
    for _ in range(10):
        futures.append(run.forward_backward([datum], "cross_entropy"))
        run.optim_step(types.AdamParams(learning_rate=2e-3))
    losses = [future.result().metrics["loss:sum"] for future in futures]
    assert losses[-1] < losses[0] < before.metrics["loss:sum"]
with call("a weight of zero takes a token out of the loss"):
    half = text_datum(inputs, targets, [0.0] * (N - 1) + [1.0])
    out = run.forward([half], "cross_entropy").result()
    assert close(out.metrics["loss:sum"], -float(out.loss_fn_outputs[0]["logprobs"].to_torch()[-1]))
with call("the loss is a sum over the data"):
    two = run.forward([datum, half], "cross_entropy").result()
    one = run.forward([datum], "cross_entropy").result()
    assert close(two.metrics["loss:sum"], one.metrics["loss:sum"] + out.metrics["loss:sum"])
    assert len(two.loss_fn_outputs) == 2
with call("several targets a position, as for a teacher's distribution"):
    several = types.Datum(
        model_input=Ints(inputs),
        loss_fn_inputs={
            "target_tokens": types.TensorData.from_torch(torch.tensor([[t, 0, 1] for t in targets])),
            "weights": types.TensorData.from_torch(torch.tensor([[0.5, 0.25, 0.25]] * N)),
        },
    )
    out = trained(several)
    assert out.loss_fn_outputs[0]["logprobs"].to_torch().shape == (N, 3)
with call("optim_step with weight decay and a bound on the gradient's norm"):
    run.optim_step(types.AdamParams(learning_rate=1e-4, weight_decay=0.01, grad_clip_norm=1.0)).result()
with call("optim_step with another family's parameters is an error, and the run goes on"):
    refused(lambda: run.optim_step(types.DimuonParams(learning_rate=1e-3)).result(), Exception, "optim")
    run.forward([datum], "cross_entropy").result()

# Reinforcement learning

with call("save_weights_and_get_sampling_client: an on-policy sampler"):
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = Ints(words[:5])
with call("sample four answers with their logprobs"):
    rollouts = sampler.sample(prompt, 4, Params(max_tokens=8, temperature=1.0, seed=3)).result().sequences
    assert len(rollouts) == 4 and all(1 <= len(each.tokens) <= 8 for each in rollouts)
    assert all(value <= 0 for each in rollouts for value in each.logprobs or [1])


def rl_datum(answer: types.SampledSequence, advantage: float) -> types.Datum:
    whole, before_it = words[:5] + list(answer.tokens), 4
    return types.Datum(
        model_input=Ints(whole[:-1]),
        loss_fn_inputs={
            "target_tokens": whole[1:],
            "logprobs": tensor([0.0] * before_it + list(answer.logprobs or [])),
            "advantages": tensor([0.0] * before_it + [advantage] * len(answer.tokens)),
        },
    )


group = [rl_datum(each, 1.0 if i % 2 else -1.0) for i, each in enumerate(rollouts)]
total = sum((1.0 if i % 2 else -1.0) * len(each.tokens) for i, each in enumerate(rollouts))
with call("the trainer's logprobs are the sampler's"):
    out = run.forward(group, "importance_sampling").result()
    got = out.loss_fn_outputs[0]["logprobs"].to_torch()[4:]
    assert torch.allclose(got, torch.tensor(rollouts[0].logprobs), atol=0.02)
for loss, config in (
    ("importance_sampling", None),
    ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
    ("cispo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    ("dro", {"beta": 0.05}),
):
    with call(f"forward_backward with {loss}"):
        out = trained(*group, loss=loss, config=config)
        assert math.isfinite(out.metrics["loss:sum"])
        if loss in ("importance_sampling", "ppo"):  # on-policy every ratio is 1
            assert abs(out.metrics["loss:sum"] + total) < 0.05 * sum(len(each.tokens) for each in rollouts)
with call("optim_step after them"):
    run.optim_step(types.AdamParams(learning_rate=1e-5)).result()
with call("without advantages there is no loss"):
    assert close(trained(rl_datum(rollouts[0], 0.0), loss="importance_sampling").metrics["loss:sum"], 0.0)

# Losses of one's own

with call("forward_backward_custom: a loss over pairs, as DPO has it"):

    def dpo(data: list[types.Datum], given: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        margin = given[0].sum() - given[1].sum()
        loss = -torch.nn.functional.logsigmoid(0.1 * margin)
        return loss, {"margin": float(margin)}

    pair = [datum, text_datum(inputs, targets[::-1])]
    first = run.forward_backward_custom(pair, dpo).result()
    assert "margin" in first.metrics
with call("and its gradient widens the margin"):
    run.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    assert run.forward_backward_custom(pair, dpo).result().metrics["margin"] > first.metrics["margin"]
with call("create_custom_loss runs on the server, and equals cross_entropy where it is written so"):

    def neg_ll(logprobs, weights):  # type: ignore[no-untyped-def]
        loss = -(logprobs * weights).sum()
        return loss, {"custom/neg_ll:sum": loss}

    handle = service.create_custom_loss(neg_ll, input_ranks={"logprobs": 1, "weights": 1}).result()
    out = run.forward_backward_custom([datum], handle).result()
    plain = run.forward([datum], "cross_entropy").result()
    assert close(out.metrics["custom/neg_ll:sum"], plain.metrics["loss:sum"])
with call("optim_step after a server-side loss"):
    run.optim_step(types.AdamParams(learning_rate=1e-4)).result()

# What is wrong is said, and costs nothing

with call("an unknown loss is a RequestFailedError that names it"):
    refused(lambda: run.forward([datum], "hinge").result(), Exception, "hinge")  # type: ignore[arg-type]
with call("targets and inputs of different lengths are a RequestFailedError"):
    refused(lambda: trained(text_datum(inputs, targets[:-1])), RequestFailedError, "target_tokens")
with call("a missing input is a RequestFailedError that names it"):
    refused(lambda: trained(datum, loss="ppo"), RequestFailedError, "ppo", "logprobs")
with call("a token that is not in the vocabulary is a RequestFailedError"):
    refused(lambda: trained(text_datum([10**9] * N, targets)), RequestFailedError, str(10**9))
with call("the run still works afterwards"):
    assert loss_of(run) > 0
with call("a model that is not served is a NotFoundError"):
    refused(lambda: service.create_lora_training_client("no/such").result(), NotFoundError, "no/such")
with call("training nothing is refused by the SDK"):
    nothing = {"train_mlp": False, "train_attn": False, "train_unembed": False}
    refused(lambda: service.create_lora_training_client(MODEL, **nothing), AssertionError, "At least one")
with call("attention alone can be trained, with Dimuon"):
    other = service.create_lora_training_client(
        MODEL, rank=4, train_mlp=False, train_unembed=False, optimizer=types.DimuonOptimizerConfig()
    ).result()
    start = other.forward_backward([datum], "cross_entropy").result().metrics["loss:sum"]
    other.optim_step(types.DimuonParams(learning_rate=1e-2)).result()
    assert loss_of(other) < start
with call("the same seed gives the same initialization"):
    twins = [service.create_lora_training_client(MODEL, rank=4, seed=11) for _ in range(2)]
    grown = []
    for twin in twins:
        twin.forward_backward([datum], "cross_entropy")
        twin.optim_step(types.AdamParams(learning_rate=1e-3))
        grown.append(loss_of(twin))
    assert grown[0] == grown[1]

# Checkpoints

at = loss_of(run)
with call("save_state answers a path to the weights"):
    saved = run.save_state("step-100", user_metadata={"step": "100"}).result()
    assert saved.path == f"tinker://{info.model_id}/weights/step-100"
with call("a name is good for one checkpoint"):
    refused(lambda: run.save_state("step-100").result(), RequestFailedError, "step-100")
with call("unless it is told to overwrite"):
    assert run.save_state("step-100", overwrite=True, ttl_seconds=DAY).result().path == saved.path
with call("training goes on, and load_state goes back"):
    run.forward_backward([datum], "cross_entropy")
    run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    assert loss_of(run) != at
    assert run.load_state(saved.path).result().path == saved.path
    assert loss_of(run) == at
with call("load_state_with_optimizer"):
    run.load_state_with_optimizer(saved.path).result()
    assert loss_of(run) == at
with call("create_training_client_from_state"):
    resumed = service.create_training_client_from_state(saved.path).result()
    assert resumed.get_info().model_id != info.model_id
    assert loss_of(resumed) == at
with call("create_training_client_from_state_with_optimizer"):
    resumed = service.create_training_client_from_state_with_optimizer(
        saved.path, user_metadata={"resumed": "yes"}
    ).result()
    assert loss_of(resumed) == at
with call("and the resumed run takes the very step that the first one takes"):
    ends = []
    for each in (run, resumed):
        each.forward_backward([datum], "cross_entropy")
        each.optim_step(types.AdamParams(learning_rate=1e-3))
        ends.append(loss_of(each))
    assert ends[0] == ends[1]
with call("save_weights_for_sampler answers a path to sampler weights"):
    weights = run.save_weights_for_sampler(
        "final", ttl_seconds=3600, user_metadata={"kind": "final"}
    ).result()
    assert weights.path == f"tinker://{info.model_id}/sampler_weights/final"
with call("a path that does not exist is an error"):
    refused(
        lambda: run.load_state(f"tinker://{info.model_id}/weights/nothing").result(), Exception, "nothing"
    )
with call("sampler weights have no optimizer state to go on with"):
    refused(
        lambda: service.create_training_client_from_state_with_optimizer(weights.path).result(), Exception
    )
with call("list_checkpoints has both, with kind, size, metadata and end"):
    listed = checkpoints()
    assert {saved.path, weights.path} <= set(listed)
    mine = listed[weights.path]
    assert (mine.checkpoint_type, mine.user_metadata, mine.public) == ("sampler", {"kind": "final"}, False)
    assert (mine.size_bytes or 0) > 0 and mine.expires_at is not None
    assert abs(mine.expires_at - datetime.now(UTC) - timedelta(hours=1)) < timedelta(minutes=5)
with call("list_user_checkpoints has them, too"):
    of_user = rest.list_user_checkpoints(limit=100).result().checkpoints
    assert saved.path in [each.tinker_path for each in of_user]
with call("get_weights_info_by_tinker_path"):
    about = rest.get_weights_info_by_tinker_path(saved.path).result()
    assert (about.base_model, about.is_lora, about.lora_rank) == (MODEL, True, 8)
with call("set_checkpoint_ttl_from_tinker_path: a week, then for ever"):
    for seconds in (7 * DAY, None):
        rest.set_checkpoint_ttl_from_tinker_path(saved.path, seconds).result()
        assert (checkpoints()[saved.path].expires_at is None) == (seconds is None)
with call("a lifetime of a minute is refused"):
    short_lived = lambda: rest.set_checkpoint_ttl_from_tinker_path(saved.path, 60).result()  # noqa: E731
    refused(short_lived, tinker.APIStatusError, "ttl_seconds")
with call("publish_checkpoint_from_tinker_path"):
    rest.publish_checkpoint_from_tinker_path(weights.path).result()
    assert checkpoints()[weights.path].public
with call("unpublish_checkpoint_from_tinker_path"):
    rest.unpublish_checkpoint_from_tinker_path(weights.path).result()
    assert not checkpoints()[weights.path].public
with call("copy_weights into the same project"):
    page = rest.search_sessions(types.SessionSearchRequest(session_id=info.model_id.split(":")[0])).result()
    copied = rest.copy_weights(weights.path, page.sessions[0].project_id, ttl_seconds=DAY).result()
    assert copied.startswith("tinker://") and copied != weights.path
with call("save_weights_external"):
    external = run.save_weights_external("export", ttl_seconds=DAY).result()
    assert external.path == f"tinker://{info.model_id}/external_weights/export"
with call("get_external_weights_urls, and a plain GET of each"):
    signed = rest.get_external_weights_urls(external.path).result()
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(signed.urls)
    assert signed.expires > datetime.now(UTC)
    files = {name: httpx.get(url) for name, url in signed.urls.items()}
    assert files["adapter_config.json"].json()["r"] == 8
with call("delete_checkpoint_from_tinker_path"):
    rest.delete_checkpoint_from_tinker_path(external.path).result()
    assert external.path not in checkpoints()

# Sampling

with call("create_sampling_client of a checkpoint"):
    tuned = service.create_sampling_client(model_path=weights.path).result()
    assert tuned.get_base_model() == MODEL
with call("create_sampling_client of the base model"):
    base = service.create_sampling_client(base_model=MODEL).result()
    assert base.get_tokenizer().encode("a b") == tokenizer.encode("a b")
with call("neither nor is refused by the SDK"):
    refused(lambda: service.create_sampling_client().result(), ValueError, "model_path")
with call("at temperature 0 the answer is always the same"):
    (best,) = sampled(tuned, temperature=0.0)
    assert sampled(tuned, temperature=0.0)[0].tokens == best.tokens
with call("and so it is with a seed, where several samples differ"):
    first, second = ([each.tokens for each in sampled(tuned, 4, seed=5)] for _ in range(2))
    assert first == second
    assert len({tuple(tokens) for tokens in first}) > 1
with call("max_tokens ends an answer with stop_reason length"):
    (short,) = sampled(base, max_tokens=1, temperature=0.0, stop=[])
    assert (len(short.tokens), short.stop_reason) == (1, "length")
with call("a stop token ends it, and is part of it"):
    (stopped,) = sampled(tuned, temperature=0.0, stop=[best.tokens[2]])
    assert (stopped.stop_reason, stopped.tokens[-1]) == ("stop", best.tokens[2])
with call("a stop text does, too"):
    text = tokenizer.decode([best.tokens[1]])
    (stopped,) = sampled(tuned, temperature=0.0, stop=[text])
    assert stopped.stop_reason == "stop"
    assert text in tokenizer.decode(stopped.tokens)
with call("top_k of one is greedy"):
    assert sampled(tuned, top_k=1)[0].tokens == best.tokens
one = Params(max_tokens=1)
with call("include_prompt_logprobs: one a token, none for the first"):
    scored = tuned.sample(Ints(words), 1, one, include_prompt_logprobs=True).result().prompt_logprobs
    assert scored is not None and len(scored) == len(words) and scored[0] is None
    assert all(value is not None and value <= 0 for value in scored[1:])
with call("compute_logprobs gives the same"):
    assert tuned.compute_logprobs(Ints(words)).result() == scored
with call("compute_logprobs of the last ones alone"):
    last = tuned.compute_logprobs(Ints(words), prompt_logprobs_last_n=3).result()
    assert last[:-3] == [None] * (len(words) - 3)
    assert all(close(a or 0, b or 0, 0.02) for a, b in zip(last[-3:], scored[-3:], strict=True))
with call("topk_prompt_logprobs: the most likely tokens at each place"):
    rows = tuned.sample(Ints(words), 1, one, topk_prompt_logprobs=3).result().topk_prompt_logprobs
    assert rows[0] is None
    assert all(len(row) == 3 and row[0][1] >= row[1][1] >= row[2][1] for row in rows[1:])
with call("topk_sample_logprobs: the same for what was sampled"):
    (each,) = tuned.sample(prompt, 1, Params(max_tokens=4, seed=1), topk_sample_logprobs=2).result().sequences
    assert [len(row) for row in each.topk_logprobs] == [2] * len(each.tokens)
with call("target_prompt_logprobs of the prompt's own tokens are its logprobs"):
    wanted = types.TensorData.from_torch(torch.tensor([[token] for token in words[1:]]))
    answer = tuned.sample(Ints(words), 1, one, target_prompt_logprobs=wanted).result()
    assert answer.target_prompt_logprobs is not None
    of_targets = answer.target_prompt_logprobs.to_torch()[:, 0].tolist()
    assert all(close(a, b or 0, 0.02) for a, b in zip(of_targets, scored[1:], strict=True))
with call("prompt_alt_tokens_k: alternatives at every place but the first"):
    drawn = tuned.sample(Ints(words), 1, one, prompt_alt_tokens_k=4).result().prompt_alt_tokens
    assert drawn is not None and drawn.tokens.to_torch().shape == (len(words) - 1, 4)
    assert bool((drawn.logprobs.to_torch() <= 0).all())
with call("a prompt that was there before is a cache hit"):
    long = Ints((words * 20)[:150])
    tuned.sample(long, 1, one).result()
    assert tuned.sample(long, 1, one).result().prompt_cache_hit_tokens > 0
with call("prompt and max_tokens beyond the context are a BadRequestError with the figures"):
    refused(lambda: sampled(tuned, max_tokens=CONTEXT), BadRequestError, str(CONTEXT))
with call("a negative temperature is a BadRequestError that names it"):
    refused(lambda: sampled(tuned, temperature=-1.0), BadRequestError, "temperature")
with call("a sampling client can be pickled for another process"):
    assert sampled(pickle.loads(pickle.dumps(tuned)), temperature=0.0)[0].tokens == best.tokens
with call("a sampler handle opens the same sampler elsewhere"):
    joined = tinker.SamplingClient.from_sampler_handle(tuned.get_sampler_handle())
    assert sampled(joined, temperature=0.0)[0].tokens == best.tokens
with call("kind='inflight' follows the run"):
    live = run.save_weights_and_get_sampling_client(kind="inflight").result()
    assert len(sampled(live)) == 1

# The same, asynchronously


async def asynchronously() -> None:
    with call("create_lora_training_client_async"):
        client = await service.create_lora_training_client_async(MODEL, rank=4, seed=1)
    with call("forward_backward_async and optim_step_async: two awaits each"):
        passed = await client.forward_backward_async([datum], "cross_entropy")
        stepped = await client.optim_step_async(types.AdamParams(learning_rate=1e-3))
        assert (await passed).metrics["loss:sum"] > 0
        await stepped
    with call("futures of the plain methods can be awaited"):
        assert (await client.forward([datum], "cross_entropy")).metrics["loss:sum"] > 0
    with call("save_weights_and_get_sampling_client_async, and sixteen samples at a time"):
        policy = await client.save_weights_and_get_sampling_client_async()
        answers = await asyncio.gather(
            *(policy.sample_async(prompt, 1, Params(max_tokens=4, seed=i)) for i in range(16))
        )
        assert all(1 <= len(each.sequences[0].tokens) <= 4 for each in answers)
    with call("compute_logprobs_async"):
        assert len(await policy.compute_logprobs_async(prompt)) == 5
    with call("save_state_async"):
        path = (await (await client.save_state_async("async"))).path
        assert path.endswith("/weights/async")
    with call("create_training_client_from_state_async"):
        assert (await service.create_training_client_from_state_async(path)).get_info().lora_rank == 4
    with call("list_training_runs_async finds the newest first"):
        found = await rest.list_training_runs_async(limit=5)
        assert info.model_id.split(":")[0] in found.training_runs[0].training_run_id


asyncio.run(asynchronously())

# What the service knows

with call("get_training_run"):
    told = rest.get_training_run(info.model_id).result()
    assert (told.base_model, told.lora_rank, told.user_metadata) == (MODEL, 8, purpose)
    assert told.last_checkpoint is not None and told.last_checkpoint.tinker_path == saved.path
with call("get_training_run_by_tinker_path"):
    assert rest.get_training_run_by_tinker_path(weights.path).result().training_run_id == info.model_id
with call("an unknown training run is a NotFoundError"):
    refused(lambda: rest.get_training_run(f"{uuid.uuid4()}:train:0").result(), NotFoundError)
session = info.model_id.split(":")[0]
with call("list_sessions and get_session"):
    assert session in rest.list_sessions(limit=20).result().sessions
    opened = rest.get_session(session).result()
    assert info.model_id in opened.training_run_ids and opened.sampler_ids
with call("get_sampler"):
    assert rest.get_sampler(opened.sampler_ids[0]).result().base_model == MODEL
with call("search_sessions by metadata"):
    wanted = types.SessionSearchRequest(user_metadata={"script": "a hundred calls"})
    page = rest.search_sessions(wanted).result()
    assert session in [each.session_id for each in page.sessions]
with call("export_session_trace gives a Perfetto file"):
    assert len(httpx.get(rest.export_session_trace(session).result()).content) > 1000
admin = tinker.AdminClient()
with call("get_billing_usage of the last hours"):
    now = datetime.now(UTC)
    begin = (now - timedelta(hours=2)).replace(minute=0, second=0, microsecond=0)
    usage = admin.get_billing_usage(begin, begin + timedelta(hours=4)).result()
    assert {"training", "sampling_sample"} <= {each.event_info.type for each in usage.data}
with call("get_current_checkpoint_storage_usage"):
    assert admin.get_current_checkpoint_storage_usage().result() is not None
with call("get_audit_log of today"):
    assert isinstance(admin.get_audit_log().result().entries, list)

# The other doors

auth = {"Authorization": f"Bearer {KEY}"}
door = httpx.Client(headers=auth, timeout=120.0)
chat = [{"role": "user", "content": "What is 2 plus 3?"}]
with call("OpenAI: models"):
    assert MODEL in [each["id"] for each in door.get(f"{BASE}/oai/api/v1/models").json()["data"]]
with call("OpenAI: completions of a checkpoint, with logprobs"):
    body = {"model": weights.path, "prompt": "The weather", "max_tokens": 4, "temperature": 0, "logprobs": 1}
    answer = door.post(f"{BASE}/oai/api/v1/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] <= 4
    assert answer["choices"][0]["logprobs"]["token_logprobs"][0] <= 0
with call("OpenAI: chat completions of the base model"):
    body = {"model": MODEL, "messages": chat, "max_tokens": 8, "n": 2}
    answer = door.post(f"{BASE}/oai/api/v1/chat/completions", json=body).json()
    assert [each["message"]["role"] for each in answer["choices"]] == ["assistant", "assistant"]
with call("OpenAI: a stream of chunks that ends with [DONE]"):
    body = {"model": MODEL, "messages": chat, "max_tokens": 4, "stream": True}
    lines = door.post(f"{BASE}/oai/api/v1/chat/completions", json=body).text.strip().splitlines()
    assert lines[0].startswith("data: {") and lines[-1] == "data: [DONE]"
with call("Anthropic: messages"):
    body = {"model": MODEL, "messages": chat, "max_tokens": 8}
    answer = door.post(f"{BASE}/anthropic/api/v1/messages", json=body).json()
    assert (answer["type"], answer["role"]) == ("message", "assistant")
    assert answer["usage"]["output_tokens"] <= 8
with call("Anthropic: count_tokens"):
    body = {"model": MODEL, "messages": chat}
    assert door.post(f"{BASE}/anthropic/api/v1/messages/count_tokens", json=body).json()["input_tokens"] > 5

# The command line

for line in ("run list", "checkpoint list", "billing checkpoint-storage"):
    with call(f"tinker --format json {line}"):
        command = [sys.executable, "-m", "tinker.cli", "--format", "json", *line.split()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) is not None

with call("close ends the session"):
    service.close("success").result()

end()
