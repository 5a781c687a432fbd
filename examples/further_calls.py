"""More of what Tinker's documentation says, each with its check: losses and inputs, futures, the older names
of calls, sessions, the command line.

    TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-... python examples/further_calls.py

As hundred_calls.py: it knows nothing of the server but its address, and ends with 1 if a call did not do as
documented.
"""

# ruff: noqa: PT018
from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import tinker
import torch
from documented import call, close, end, refused
from tinker import types

warnings.simplefilter("ignore")  # the older names say that they are old

LENGTH = 12
Ints, Params, Tensor = types.ModelInput.from_ints, types.SamplingParams, types.TensorData
service = tinker.ServiceClient(user_metadata={"script": "further calls"})
rest, admin = tinker.RestClient(), tinker.AdminClient()
MODEL = (
    os.environ.get("MODEL") or rest.get_server_capabilities().result().supported_models[0].model_name or ""
)
run = service.create_lora_training_client(MODEL, rank=8, seed=3).result()
session = run.model_id.split(":")[0]
tokens = run.get_tokenizer().encode("A longer sentence, so that there is something to learn from it.")[
    :LENGTH
]
targets = [*tokens[1:], tokens[0]]


def datum(**inputs: Any) -> types.Datum:
    """Of the tokens, with targets and what else is given."""
    return types.Datum(model_input=Ints(tokens), loss_fn_inputs={"target_tokens": targets, **inputs})


def floats(values: list[float]) -> types.TensorData:
    return Tensor.from_torch(torch.tensor(values, dtype=torch.float32))


def loss(of: types.Datum, name: Any = "cross_entropy", config: Any = None) -> float:
    return run.forward([of], name, loss_fn_config=config).result().metrics["loss:sum"]


def command(*words: str, form: str = "json") -> str:
    """What `tinker WORDS` prints."""
    line = [sys.executable, "-m", "tinker.cli", "--format", form, *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Inputs

plain = datum(weights=[1.0] * LENGTH)
with call("numpy arrays as inputs of a loss"):
    arrays = types.Datum(
        model_input=Ints(np.asarray(tokens).tolist()),
        loss_fn_inputs={"weights": np.ones(LENGTH, np.float32), "target_tokens": np.asarray(targets)},
    )
    assert loss(arrays) == loss(plain)
with call("a prompt that grows by chunks is the same prompt"):
    grown = types.ModelInput.empty().append(types.EncodedTextChunk(tokens=tokens[:5]))
    for token in tokens[5:]:
        grown = grown.append_int(token)
    assert (grown.length, grown.to_ints()) == (LENGTH, tokens)
    parts = types.Datum(model_input=grown, loss_fn_inputs=plain.loss_fn_inputs)
    assert loss(parts) == loss(plain)
with call("without weights every target counts once"):
    assert loss(datum()) == loss(plain)
with call("weights may be any numbers"):
    assert close(loss(datum(weights=floats([-0.5] * LENGTH))), -0.5 * loss(plain))
with call("sparse targets and weights are worth what they are as dense ones"):
    wide = torch.zeros(LENGTH, 16, dtype=torch.int64)
    mass = torch.zeros(LENGTH, 16)
    wide[:, 0], mass[:, 0] = torch.tensor(targets), 1.0
    found = [
        loss(types.Datum(model_input=Ints(tokens), loss_fn_inputs={"target_tokens": t, "weights": w}))
        for t, w in (
            (Tensor.from_torch(wide), Tensor.from_torch(mass)),
            (Tensor.from_torch_sparse(wide), Tensor.from_torch_sparse(mass)),
        )
    ]
    assert found[0] == found[1] and close(found[0], loss(plain))
with call("an optimizer step says how long the gradient was"):
    run.forward_backward([plain], "cross_entropy")
    stepped = run.optim_step(types.AdamParams(learning_rate=0.0)).result()
    assert stepped.metrics is not None and all(value > 0 for value in stepped.metrics.values())
with call("the defaults of AdamParams"):
    adam = types.AdamParams()
    assert (adam.learning_rate, adam.beta1, adam.beta2, adam.eps) == (1e-4, 0.9, 0.95, 1e-12)
    assert (adam.weight_decay, adam.grad_clip_norm) == (0.0, 0.0)

# Losses

old = run.forward([plain], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_torch()
rl: dict[str, Any] = {"logprobs": floats((old - 0.5).tolist()), "advantages": floats([1.0] * LENGTH)}
with call("importance_sampling: the ratios' sum, negative"):
    assert close(loss(datum(**rl), "importance_sampling"), -LENGTH * float(np.exp(0.5)))
with call("ppo: ratios end at 1.2 unless it is told otherwise"):
    assert close(loss(datum(**rl), "ppo"), -LENGTH * 1.2)
    assert close(loss(datum(**rl), "ppo", {"clip_high_threshold": 1.4}), -LENGTH * 1.4)
with call("ppo: bounds of each token's own"):
    bounds = {"clip_low_threshold": floats([0.5] * LENGTH), "clip_high_threshold": floats([1.1] * LENGTH)}
    assert close(loss(datum(**rl, **bounds), "ppo"), -LENGTH * 1.1)
with call("cispo: the bound weighs the logprob"):
    high = {"clip_low_threshold": 0.0, "clip_high_threshold": 1.1}
    assert close(loss(datum(**rl), "cispo", high), -1.1 * float(old.sum()))
with call("dro: advantages, less a square"):
    beta = 0.05
    expected = -float((old - beta / 2 * 0.25).sum())
    assert close(loss(datum(**rl), "dro", {"beta": beta}), expected)
with call("gspo: one ratio for a whole sequence"):
    masked = datum(**rl, sequence_ratio_mask=floats([1.0] * LENGTH))
    assert close(loss(masked, "gspo", {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}),
                 -LENGTH * float(np.exp(0.5)))  # fmt: skip
with call("stable_reinforce: on what was recorded at sampling"):
    recorder = run.save_weights_and_get_sampling_client(record_stability_info=True).result()
    (said,) = recorder.sample(Ints(tokens[:4]), 1, Params(max_tokens=5, stop=[])).result().sequences
    told = types.Datum(
        model_input=Ints([*tokens[:4], *said.tokens[:-1]]),
        loss_fn_inputs={
            "target_tokens": [*tokens[1:4], *said.tokens],
            "advantages": floats([0.0] * 3 + [1.0] * 5),
        },
    ).with_provenance(
        model_input=[
            types.PromptProvenanceSpan(sequence_id=said.sequence_id, length=4),
            types.SampledProvenanceSpan(sequence_id=said.sequence_id, length=4),
        ],
        loss_fn_inputs=[
            types.PromptProvenanceSpan(sequence_id=said.sequence_id, offset=1, length=3),
            types.SampledProvenanceSpan(sequence_id=said.sequence_id, length=5),
        ],
    )
    passed = run.forward([told], "stable_reinforce").result()
    logprobs = passed.loss_fn_outputs[0]["logprobs"].to_torch()[3:]
    assert torch.allclose(logprobs, torch.tensor(said.logprobs), atol=0.02)
with call("forward_backward_custom: the variance over all sequences"):

    def variance(data: list[types.Datum], given: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        value = torch.cat(given).var()
        return value, {"variance_loss": value.item()}

    answer = run.forward_backward_custom([plain, plain], variance).result()
    assert close(answer.metrics["variance_loss"], float(torch.cat([old, old]).var()), 0.05)

# Futures

with call("a future's coroutine, with a timeout of asyncio"):

    async def wait() -> float:
        passed = run.forward([plain], "cross_entropy").coroutine()
        return (await asyncio.wait_for(passed, 60)).metrics["loss:sum"]

    assert asyncio.run(wait()) == loss(plain)
with call("a future of concurrent.futures"):
    assert run.forward([plain], "cross_entropy").future().result(60).metrics["loss:sum"] == loss(plain)
with call("result(timeout) gives up, and the call is done all the same"):
    late = run.forward([plain] * 64, "cross_entropy")
    refused(lambda: late.result(timeout=0.0001), TimeoutError)
    assert len(late.result().loss_fn_outputs) == 64

# The older names


async def by_their_older_names() -> None:
    with call("the older names of a ServiceClient's calls"):
        known = await service.get_server_capabilities_async()
        assert MODEL in [model.model_name for model in known.supported_models]
        sampler = await service.create_sampling_client_async(base_model=MODEL)
        assert await sampler.get_base_model_async() == MODEL
    with call("the older names of a TrainingClient's calls"):
        assert (await run.get_info_async()).lora_rank == 8
        assert (await (await run.forward_async([plain], "cross_entropy"))).metrics["loss:sum"] > 0
        custom = await run.forward_backward_custom_async([plain], variance)
        assert "variance_loss" in (await custom).metrics
        await (await run.optim_step_async(types.AdamParams(learning_rate=0.0)))
        state = (await (await run.save_state_async("older"))).path
        await (await run.load_state_async(state))
        await (await run.load_state_with_optimizer_async(state))
        weights = (await (await run.save_weights_for_sampler_async("older"))).path
        external = (await (await run.save_weights_external_async("older"))).path
        sampler = await run.create_sampling_client_async(weights)
        assert (await sampler.sample_async(Ints(tokens), 1, Params(max_tokens=1))).sequences
        again = await service.create_training_client_from_state_with_optimizer_async(state)
        assert again.model_id != run.model_id
    with call("the older names of a RestClient's calls"):
        assert (await rest.get_training_run_async(run.model_id)).lora_rank == 8
        assert (await rest.get_training_run_by_tinker_path_async(state)).training_run_id == run.model_id
        saved = {each.tinker_path for each in (await rest.list_checkpoints_async(run.model_id)).checkpoints}
        assert {state, weights, external} <= saved
        assert (await rest.list_user_checkpoints_async(limit=5)).checkpoints
        await rest.set_checkpoint_ttl_from_tinker_path_async(state, 7200)
        await rest.publish_checkpoint_from_tinker_path_async(weights)
        await rest.unpublish_checkpoint_from_tinker_path_async(weights)
        assert (await rest.get_external_weights_urls_async(external)).urls
        assert session in (await rest.list_sessions_async()).sessions
        opened = await rest.get_session_async(session)
        assert (await rest.get_sampler_async(opened.sampler_ids[0])).base_model == MODEL
        await rest.delete_checkpoint_from_tinker_path_async(weights)


asyncio.run(by_their_older_names())

# Checkpoints and sessions

kept = run.save_state("kept", user_metadata={"recipe": "further"}).result()
with call("a saved checkpoint has a page in the console"):
    assert kept.get_console_url().startswith("http")
with call("the first part of a run's id lists the checkpoints, as the tutorial has it"):
    listed = rest.list_checkpoints(session).result().checkpoints
    assert kept.path in [each.tinker_path for each in listed]
with call("TrainingClient.create_sampling_client of a path"):
    path = run.save_weights_for_sampler("sampler").result().path
    mine = run.create_sampling_client(path).result()
    greedy = Params(max_tokens=4, temperature=0.0, stop=[])
    assert len(mine.sample(Ints(tokens), 1, greedy).result().sequences[0].tokens) == 4
with call("create_sampling_client with a path and its base model"):
    both = service.create_sampling_client(model_path=path, base_model=MODEL).result()
    one, other = (each.sample(Ints(tokens), 1, greedy).result().sequences[0] for each in (mine, both))
    assert (one.tokens, one.logprobs) == (other.tokens, other.logprobs)
with call("a checkpoint's id has its kind: the bare name is a BadRequestError"):
    refused(lambda: rest.delete_checkpoint(run.model_id, "kept").result(), tinker.BadRequestError, "weights")
with call("what there is not is a NotFoundError"):
    nowhere = f"tinker://{run.model_id}/weights/nowhere"
    for work in (
        lambda: rest.get_weights_info_by_tinker_path(nowhere).result(),
        lambda: rest.delete_checkpoint_from_tinker_path(nowhere).result(),
        lambda: rest.set_checkpoint_ttl_from_tinker_path(nowhere, 7200).result(),
        lambda: rest.publish_checkpoint_from_tinker_path(nowhere).result(),
        lambda: rest.list_checkpoints(f"{session}:train:99").result(),
    ):
        refused(work, tinker.NotFoundError)
with call("access_scope: one's own, or all that one may see"):
    for scope in ("owned", "accessible"):
        runs = rest.list_training_runs(limit=5, access_scope=scope).result()  # type: ignore[arg-type]
        assert run.model_id in [each.training_run_id for each in runs.training_runs]
        assert runs.cursor.total_count >= len(runs.training_runs)
with call("assign_session_project: to the project where it is"):
    wanted = types.SessionSearchRequest(session_id=session)
    project = rest.search_sessions(wanted).result().sessions[0].project_id
    rest.assign_session_project(session, project).result()
    assert rest.search_sessions(wanted).result().sessions[0].project_id == project
with call("a session that was closed with success says so"):
    short = tinker.ServiceClient()
    short.create_lora_training_client(MODEL, rank=1).result()
    gone = short.holder.get_session_id()
    short.close("success").result()
    (entry,) = rest.search_sessions(types.SessionSearchRequest(session_id=gone)).result().sessions
    assert entry.status is not None and entry.status.type == "client_finished"
with call("AdminClient by its older names"):

    async def of_the_admin() -> None:
        assert (await admin.get_audit_log_async()).entries is not None
        assert await admin.get_current_checkpoint_storage_usage_async() is not None
        begin = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        assert await admin.get_billing_usage_async(begin, begin + timedelta(hours=1)) is not None

    asyncio.run(of_the_admin())

# The command line

with call("tinker version and model list"):
    assert tinker.__version__ in command("version", form="table")
    assert MODEL in command("model", "list")
with call("tinker run info"):
    assert json.loads(command("run", "info", run.model_id))["training_run_id"] == run.model_id
with call("tinker checkpoint info, set-ttl, publish and unpublish"):
    assert kept.path in command("checkpoint", "info", kept.path)
    command("checkpoint", "set-ttl", kept.path, "--ttl", "7200")
    command("checkpoint", "publish", kept.path)
    command("checkpoint", "unpublish", kept.path)
with call("tinker checkpoint list --run-id"):
    assert kept.path in command("checkpoint", "list", "--run-id", run.model_id)
with call("tinker checkpoint download of external weights"), tempfile.TemporaryDirectory() as folder:
    outside = run.save_weights_external("outside").result().path
    command("checkpoint", "download", outside, "--output", folder)
    names = {file.name for file in Path(folder).rglob("*") if file.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names
with call("tinker auth whoami and status"):
    assert "@" in command("auth", "whoami") or "user" in command("auth", "whoami")
    command("auth", "status")
with call("tinker checkpoint delete"):
    command("checkpoint", "delete", outside, "--yes")
    assert outside not in command("checkpoint", "list", "--run-id", run.model_id)

service.close("success").result()
end()
