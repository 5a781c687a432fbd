"""What every program does with the SDK, in calls that all its versions have.

Run by test_versions.py with one version of the SDK on the path; prints what came out as JSON. It asks the
server and nothing else: TINKER_BASE_URL, TINKER_API_KEY, and the model as its only argument.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import tinker
from tinker import types

warnings.simplefilter("ignore")


def done(future: Any) -> Any:
    """Calls answer with a future in some versions, and with the thing itself in others."""
    return future.result() if callable(getattr(future, "result", None)) else future


def datum(length: int, first: int) -> types.Datum:
    tokens = [(first + i) % 256 for i in range(length)]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=[(t + 1) % 256 for t in tokens], dtype="int64"),
            "weights": types.TensorData(data=[1.0] * length, dtype="float32"),
        },
    )


def logprobs(result: Any) -> list[list[float]]:
    return [[float(value) for value in output["logprobs"].data] for output in result.loss_fn_outputs]


def main(model: str) -> dict[str, Any]:
    report: dict[str, Any] = {"version": tinker.__version__}
    client = tinker.ServiceClient(user_metadata={"suite": "core"})
    capabilities = done(client.get_server_capabilities())
    report["models"] = [each.model_name for each in capabilities.supported_models]

    training = done(client.create_lora_training_client(base_model=model, rank=4, seed=1))
    info = training.get_info()
    report["info"] = [info.model_data.model_name, info.is_lora, info.lora_rank]
    report["tokens"] = len(training.get_tokenizer().encode("hello"))

    data = [datum(12, 0), datum(9, 50)]
    report["forward"] = logprobs(done(training.forward(data, "cross_entropy")))
    losses = []
    for _ in range(3):
        passed = training.forward_backward(data, "cross_entropy")
        step = training.optim_step(types.AdamParams(learning_rate=1e-2))
        losses.append(done(passed).metrics["loss:sum"])
        done(step)
    report["losses"] = losses
    report["trained"] = logprobs(done(training.forward(data, "cross_entropy")))
    many = [datum(3 + i % 5, i % 200) for i in range(1500)]
    report["many"] = [len(each) for each in logprobs(done(training.forward(many, "cross_entropy")))]

    def custom(data: Any, values: Any) -> Any:
        loss = -sum(each.sum() for each in values)
        return loss, {"total:sum": float(loss.detach())}

    report["custom"] = done(training.forward_backward_custom(data, custom)).metrics["total:sum"]
    done(training.optim_step(types.AdamParams(learning_rate=0.0)))

    state = done(training.save_state("state")).path
    weights = done(training.save_weights_for_sampler("weights")).path
    report["paths"] = [state.partition("/")[2].split("/")[-2:], weights.partition("/")[2].split("/")[-2:]]
    again = done(client.create_training_client_from_state_with_optimizer(state))
    report["loaded"] = logprobs(done(again.forward(data, "cross_entropy")))
    anew = done(client.create_training_client_from_state(state))
    report["anew"] = logprobs(done(anew.forward(data, "cross_entropy")))

    prompt = types.ModelInput.from_ints([1, 2, 3, 4])
    params = types.SamplingParams(max_tokens=6, seed=3, temperature=0.7, stop=[])
    sampler = done(client.create_sampling_client(model_path=weights))
    sampled = done(sampler.sample(prompt=prompt, num_samples=2, sampling_params=params))
    report["sampled"] = [list(map(int, each.tokens)) for each in sampled.sequences]
    report["prompt"] = done(sampler.compute_logprobs(prompt))
    ephemeral = done(training.save_weights_and_get_sampling_client())
    unnamed = done(ephemeral.sample(prompt=prompt, num_samples=2, sampling_params=params))
    report["unnamed"] = [list(map(int, each.tokens)) for each in unnamed.sequences]
    base = done(client.create_sampling_client(base_model=model))
    top = done(
        base.sample(
            prompt=prompt, num_samples=1, sampling_params=params,
            include_prompt_logprobs=True, topk_prompt_logprobs=2,
        )
    )  # fmt: skip
    report["topk"] = [each and len(each) for each in top.topk_prompt_logprobs]

    rest = client.create_rest_client() if hasattr(client, "create_rest_client") else tinker.RestClient()
    done(rest.publish_checkpoint_from_tinker_path(state))
    listed = done(rest.list_checkpoints(training.model_id)).checkpoints
    report["listed"] = sorted([each.checkpoint_id, each.checkpoint_type, each.public] for each in listed)
    done(rest.unpublish_checkpoint_from_tinker_path(state))
    done(rest.set_checkpoint_ttl_from_tinker_path(state, 7200))
    mine = done(rest.list_user_checkpoints(limit=100))
    report["expires"] = [
        each.expires_at is not None for each in mine.checkpoints if each.tinker_path == state
    ]
    run = done(rest.get_training_run(training.model_id))
    report["run"] = [run.base_model, run.lora_rank, run.last_checkpoint.checkpoint_id]
    runs = done(rest.list_training_runs(limit=10))
    report["in_runs"] = training.model_id in [each.training_run_id for each in runs.training_runs]
    session_id = training.model_id.partition(":")[0]
    report["session"] = training.model_id in done(rest.get_session(session_id)).training_run_ids
    report["in_sessions"] = session_id in done(rest.list_sessions(limit=10)).sessions
    report["weights"] = done(rest.get_weights_info_by_tinker_path(state)).lora_rank
    done(rest.delete_checkpoint_from_tinker_path(weights))
    left = done(rest.list_checkpoints(training.model_id)).checkpoints
    report["left"] = [each.checkpoint_id for each in left]

    unknown = types.Datum(
        model_input=types.ModelInput.from_ints([10**6]), loss_fn_inputs=datum(1, 0).loss_fn_inputs
    )
    try:
        done(training.forward_backward([unknown], "cross_entropy"))
    except Exception as error:
        report["refused"] = [type(error).__name__, str(10**6) in str(error)]
    done(training.optim_step(types.AdamParams(learning_rate=1e-3)))
    if hasattr(client, "close"):
        client.close("success").result()
    return report


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
