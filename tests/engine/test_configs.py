"""Settings of configs that few models have, each of which changes what comes out: none may be overlooked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.engine.reference import Reference
from tests.engine.test_sampler import PLENTY, ids, lps, run, sample, trainer_logprobs
from tests.engine.test_training import sequences, train
from tests.engine.tiny import SIZES, load, logprobs, make_family, make_run, relative, request, tokens
from tinsmith.engine.model.checks import check
from tinsmith.engine.sampler import Sampler

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STATE = {"n_groups": 1, "state_size": 16, "chunk_size": 16}
MAMBA = {
    **SIZES,
    "mamba_d_ssm": 128,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "lm_head_multiplier": 0.3,
}
CHUNKS = {
    **SIZES,
    "head_dim": 16,
    "intermediate_size_mlp": 128,
    "attention_chunk_size": 16,
    "num_local_experts": 4,
    "moe_layers": [],
}
LONG = {
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
    },
}
# What it is about: transformers' name of a family, settings of its config, and the path it takes.
ROWS: dict[str, tuple[str, dict[str, Any], str]] = {
    "logits are divided": ("Granite", {**SIZES, **SPECIAL, "logits_scaling": 8.0}, "packed"),
    "logits are multiplied": ("Cohere", {**SIZES, **SPECIAL, "logit_scale": 0.0625}, "packed"),
    "embeddings are multiplied": ("FalconH1", MAMBA | {"embedding_multiplier": 5.0}, "packed, recurrent"),
    "no attention": ("Mamba2", {**SIZES, "num_heads": 4, "head_dim": 32, **STATE}, "packed, recurrent"),
    "attention in chunks": ("Llama4Text", CHUNKS, "generic"),
    "two attentions a layer": ("DiffLlama", SIZES, "generic"),
    "long sequences are rotated otherwise": ("Phi3", {**SIZES, **SPECIAL, **LONG}, "packed"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("configs")

    def get(row: str) -> Path:
        name, settings, _ = ROWS[row]
        place = root / row.replace(" ", "-")
        return place if place.exists() else make_family(name, "ForCausalLM", place, settings)

    return get


@pytest.mark.parametrize("row", ROWS)
def test_what_comes_out_is_what_transformers_gives(folder: Callable[[str], Path], row: str) -> None:
    model = load(folder(row))
    check(model)
    assert model.way == ROWS[row][2]
    trained = make_run(model)
    texts = sequences(0, (40, 5, 90))
    out = train(trained, request(texts))
    reference = Reference(folder(row), trained)
    reference.run_loss(texts, lambda _, lp: -lp.sum())
    for ours, text in zip(logprobs(out), texts, strict=True):
        assert relative(ours, reference.logprobs(text).detach()) < 1e-5
    assert trained.live.gradient is not None
    views = trained.layout.views(trained.live.gradient)
    for slot, theirs in reference.gradients().items():
        for mine, other in zip(views[slot], theirs, strict=True):
            assert relative(mine, other) < 1e-5, slot
    prompt = tokens(70, 1)
    (drawn,) = run(Sampler(model, PLENTY), (sample("s", prompt, max_tokens=20, stop=()), trained.weights))
    (sequence,) = drawn.sequences
    expected = trainer_logprobs(model, trained.weights, prompt + ids(sequence))[len(prompt) - 1 :]
    if model.way == "packed":
        assert np.array_equal(lps(sequence), expected)
    else:
        assert relative(lps(sequence), expected) < 1e-5


def test_a_sequence_that_grows_long_is_rotated_anew(folder: Callable[[str], Path]) -> None:
    """As transformers' forward has it at every length, whatever stands in the same passes; a prefix in the
    cache is no use to a longer sequence that is rotated otherwise."""
    model = load(folder("long sequences are rotated otherwise"))
    sampler, weights = Sampler(model, PLENTY), make_run(model).weights
    work = [
        (sample(f"s{i}", tokens(n, i), max_tokens=12, stop=(), seed=i), weights)
        for i, n in enumerate((60, 3))
    ]
    for (command, _), out in zip(work, run(sampler, *work, gap=2), strict=True):
        text = np.frombuffer(command.prompt, np.int32).tolist()
        (sequence,) = out.sequences
        for token, logprob in zip(ids(sequence), lps(sequence), strict=True):
            text.append(token)
            assert trainer_logprobs(model, weights, text)[-1] == logprob
    short = tokens(64, 7)
    run(sampler, (sample("short", short, max_tokens=1), weights))
    (longer,) = run(sampler, (sample("longer", [*short, 1], max_tokens=1), weights))
    assert longer.prompt_cache_hit_tokens == 0


def test_routers_have_no_adapters(tmp_path: Path) -> None:
    settings = {
        **SIZES,
        "num_hidden_layers": 2,
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "mamba_d_state": 16,
        "use_mamba_kernels": False,
    }
    model = load(make_family("Jamba", "ForCausalLM", tmp_path / "jamba", settings))
    assert any(slot.experts for slot in model.slots)
    assert not [slot.name for slot in model.slots if "router" in slot.name]


def test_states_of_another_type_than_the_weights_are_cast_as_the_model_does(
    folder: Callable[[str], Path],
) -> None:
    model = load(folder("no attention"), torch.bfloat16)  # which keeps its residuals in fp32
    check(model)
    (out,) = run(Sampler(model, PLENTY), (sample("s", tokens(20, 1), max_tokens=5, stop=()), None))
    (sequence,) = out.sequences
    text = tokens(20, 1) + ids(sequence)
    expected = trainer_logprobs(model, None, text)
    assert relative(lps(sequence), expected[19:]) < 2e-2
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder("no attention"), dtype=torch.bfloat16)
    with torch.no_grad():
        logits = plain(torch.tensor([text])).logits.float()
    theirs = logits.log_softmax(-1)[0, torch.arange(len(text) - 1), text[1:]]
    assert relative(expected, theirs) < 2e-2
