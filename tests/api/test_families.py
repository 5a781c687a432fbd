"""Every family from its folder to the SDK: one server has all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import tinker
import torch
from tinker import types
from transformers import AutoModelForCausalLM

from tests.engine.tiny import relative, tokens
from tests.families import FAMILIES, GENERIC, QUANTIZED, RECURRENT, make
from tests.harness import Server
from tests.quantized import full

ROWS = [*FAMILIES, *QUANTIZED]
GREEDY = [(40, 12), (7, 20), (90, 5), (1, 9)]  # tokens of a prompt, tokens to sample


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {row: make(row, root) for row in ROWS}


@pytest.fixture(scope="module")
def client(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tinker.ServiceClient]:
    server = Server(Path(), tmp_path_factory.mktemp("server") / "data", "--poll-hold", "20")
    server.models = {f"tests/{row}": folder for row, folder in folders.items()}
    server.start(wait=False)
    try:
        server.wait_until_ready(120.0)
        with server.sdk() as client:
            yield client
    finally:
        server.end()


@pytest.mark.parametrize("row", ROWS)
class TestServed:
    def test_logprobs_are_those_of_transformers(
        self, client: tinker.ServiceClient, folders: dict[str, Path], row: str
    ) -> None:
        texts = [tokens(n, n) for n in (33, 5, 80)]
        training = client.create_lora_training_client(f"tests/{row}", rank=4, seed=1).result()
        out = training.forward([datum(text) for text in texts], "cross_entropy").result()
        reference = AutoModelForCausalLM.from_pretrained(full(folders[row]), attn_implementation="eager")
        for text, output in zip(texts, out.loss_fn_outputs, strict=True):
            assert relative(logprobs(output), expected(reference, text)) < 1e-5

    def test_greedy_samples_are_those_of_generate(
        self, client: tinker.ServiceClient, folders: dict[str, Path], row: str
    ) -> None:
        """Sequences of many lengths, which join and leave one batch."""
        sampler = client.create_sampling_client(base_model=f"tests/{row}").result()
        prompts = [tokens(n, n) for n, _ in GREEDY]
        futures = [
            sampler.sample(
                types.ModelInput.from_ints(prompt),
                num_samples=1,
                sampling_params=types.SamplingParams(temperature=0.0, max_tokens=count, stop=[]),
            )
            for prompt, (_, count) in zip(prompts, GREEDY, strict=True)
        ]
        reference = AutoModelForCausalLM.from_pretrained(full(folders[row]), dtype=torch.float32)
        for prompt, (_, count), future in zip(prompts, GREEDY, futures, strict=True):
            ids = torch.tensor([prompt])
            out = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert list(future.result().sequences[0].tokens) == out[0, len(prompt) :].tolist()

    def test_training_lowers_the_loss_and_goes_on_from_a_saved_state(
        self, client: tinker.ServiceClient, row: str
    ) -> None:
        data = [datum(tokens(n, n)) for n in (30, 12)]
        training = client.create_lora_training_client(f"tests/{row}", rank=4, seed=1).result()
        losses = train(training, data, 5)
        path = training.save_state("middle").result().path
        losses += train(training, data, 5)
        assert losses[-1] < losses[0]
        resumed = client.create_training_client_from_state_with_optimizer(path).result()
        assert train(resumed, data, 5) == losses[5:]
        ours, theirs = (
            [logprobs(o) for o in each.forward(data, "cross_entropy").result().loss_fn_outputs]
            for each in (training, resumed)
        )
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))

    def test_the_sampler_reports_the_logprobs_of_the_trainer(
        self, client: tinker.ServiceClient, row: str
    ) -> None:
        prompt = tokens(20, 3)
        training = client.create_lora_training_client(f"tests/{row}", rank=4, seed=1).result()
        train(training, [datum(tokens(30, 30))], 2)
        sampler = training.save_weights_and_get_sampling_client().result()
        params = types.SamplingParams(max_tokens=15, seed=1, stop=[])
        drawn = sampler.sample(types.ModelInput.from_ints(prompt), 2, params).result().sequences
        for sequence in drawn:
            text = prompt + list(sequence.tokens)
            (output,) = training.forward([datum(text)], "cross_entropy").result().loss_fn_outputs
            mine, sampled = logprobs(output)[len(prompt) - 1 :], np.array(sequence.logprobs, np.float32)
            if row in RECURRENT | GENERIC:
                assert relative(sampled, mine) < 1e-5
            else:
                assert np.array_equal(sampled, mine)


def train(training: tinker.TrainingClient, data: list[types.Datum], steps: int) -> list[float]:
    """The loss before each step."""
    losses = []
    for _ in range(steps):
        loss = training.forward_backward(data, "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        losses.append(loss.result().metrics["loss:sum"])
    return losses


def datum(text: Sequence[int]) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(text[:-1])),
        loss_fn_inputs={"target_tokens": types.TensorData(data=list(text[1:]), dtype="int64")},
    )


def logprobs(output: dict[str, types.TensorData]) -> np.ndarray:
    return np.asarray(output["logprobs"].data, np.float32)


@torch.no_grad()
def expected(model: torch.nn.Module, text: Sequence[int]) -> torch.Tensor:
    """transformers' logprobs of text[1:]."""
    table = torch.log_softmax(model(torch.tensor([text[:-1]])).logits[0].float(), -1)
    return table.gather(1, torch.tensor(text[1:])[:, None])[:, 0]
