"""Families beyond the first ones, with every feature that their config classes have; the code names none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.reference import Reference
from tests.engine.test_sampler import PLENTY, ids, lps, run, sample, trainer_logprobs
from tests.engine.test_training import sequences, train
from tests.engine.tiny import SIZES, load, logprobs, make_family, make_run, relative, request, tokens
from tinsmith.engine.exactness import failures
from tinsmith.engine.model.checks import check
from tinsmith.engine.sampler import Sampler

HEAD = {"head_dim": 16}
FAMILIES = {
    "Mistral": {**SIZES, **HEAD, "sliding_window": 8},
    "Olmo3": SIZES,
    "Phi3": {**SIZES, "pad_token_id": 0},
    "GptOss": {**SIZES, **HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "DeepseekV3": {
        **SIZES,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
    },
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("families")

    def get(name: str) -> Path:
        if not (root / name).exists():
            make_family(name, "ForCausalLM", root / name, FAMILIES[name])
        return root / name

    return get


@pytest.mark.parametrize("name", FAMILIES)
class TestFamily:
    def test_logprobs_and_gradients_are_those_of_transformers(
        self, family: Callable[[str], Path], name: str
    ) -> None:
        model = load(family(name))
        check(model)
        assert failures(model, 32) == []
        trained = make_run(model)
        texts = sequences(0, (40, 5, 90))
        out = train(trained, request(texts))
        reference = Reference(family(name), trained)
        reference.run_loss(texts, lambda _, lp: -lp.sum())
        for ours, text in zip(logprobs(out), texts, strict=True):
            assert relative(ours, reference.logprobs(text).detach()) < 1e-5
        assert trained.live.gradient is not None
        views = trained.layout.views(trained.live.gradient)
        for slot, theirs in reference.gradients().items():
            for mine, other in zip(views[slot], theirs, strict=True):
                assert relative(mine, other) < 1e-5, slot

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_the_sampler_is_the_trainer_bit_for_bit(
        self, family: Callable[[str], Path], name: str, dtype: torch.dtype
    ) -> None:
        model = load(family(name), dtype)
        weights = make_run(model, 8).weights
        work = [
            (sample(f"s{i}", tokens(n, i), max_tokens=30, stop=(), seed=i), w)
            for i, (n, w) in enumerate(((70, weights), (3, None), (130, weights)))
        ]
        for (command, adapter), out in zip(work, run(Sampler(model, PLENTY), *work, gap=2), strict=True):
            prompt = np.frombuffer(command.prompt, np.int32).tolist()
            (sequence,) = out.sequences
            expected = trainer_logprobs(model, adapter, prompt + ids(sequence))
            assert np.array_equal(lps(sequence), expected[len(prompt) - 1 :])

    def test_greedy_is_transformers_generate(self, family: Callable[[str], Path], name: str) -> None:
        reference = AutoModelForCausalLM.from_pretrained(family(name), dtype=torch.float32)
        prompt = torch.tensor([tokens(40, 9)])
        expected = reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=25,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        command = sample("g", tokens(40, 9), max_tokens=25, stop=(), temperature=0.0)
        (out,) = run(Sampler(load(family(name)), PLENTY), (command, None))
        assert ids(out.sequences[0]) == expected[0, 40:].tolist()
