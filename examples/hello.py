"""The shortest training loop: teach the model one sentence. TINKER_BASE_URL and TINKER_API_KEY say where."""

import os

import tinker
from tinker import types

with tinker.ServiceClient() as service:
    run = service.create_lora_training_client(os.environ.get("MODEL", "tinsmith/tin-5m"), rank=16)
    tokenizer = run.get_tokenizer()
    tokens = tokenizer.encode("The quick brown fox jumps over the lazy dog.")
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
    for step in range(25):
        loss = run.forward_backward([datum], "cross_entropy")
        update = run.optim_step(types.AdamParams(learning_rate=2e-3))
        print(step, loss.result().metrics["loss:sum"], update.result().metrics)
    sampler = run.save_weights_and_get_sampling_client()
    params = types.SamplingParams(max_tokens=30, temperature=0.0)
    answer = sampler.sample(types.ModelInput.from_ints(tokens[:6]), num_samples=1, sampling_params=params)
    print(tokenizer.decode(tokens[:6] + list(answer.result().sequences[0].tokens)))
