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
from tinsmith.engine.exactness import settle
from tinsmith.engine.model.checks import check
from tinsmith.engine.sampler import Sampler

HEAD = {"head_dim": 16}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
SHARED = {"num_experts": 8, "shared_expert_intermediate_size": 32}
FAMILIES = {
    "Mistral": {**SIZES, **HEAD, "sliding_window": 8},
    "Olmo3": SIZES,
    "Phi3": {**SIZES, "pad_token_id": 0},
    "GptOss": {**SIZES, **HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "DeepseekV3": {
        **SIZES,
        **MLA,
        **EXPERTS,
        "q_lora_rank": 32,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "Qwen3_5Text": {**SIZES, **HEAD, **DELTA},
    "Qwen3_5MoeText": {**SIZES, **HEAD, **DELTA, **EXPERTS, **SHARED},
    "Qwen3Next": {**SIZES, **HEAD, **DELTA, **EXPERTS, **SHARED},
    "NemotronH": {
        **{name: size for name, size in SIZES.items() if name != "num_hidden_layers"},
        **HEAD,
        **EXPERTS,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 8,
        "moe_shared_expert_intermediate_size": 32,
        "moe_latent_size": 32,
    },
    "KimiLinear": {
        **SIZES,
        **MLA,
        **EXPERTS,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "linear_num_heads": 4,
        "linear_head_dim": 16,
        "num_local_experts": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "Lfm2": {**SIZES, "layer_types": ["conv", "full_attention"]},
}
# Their layers take one token and many by different formulas.
RECURRENT = {"Qwen3_5Text", "Qwen3_5MoeText", "Qwen3Next", "NemotronH", "KimiLinear"}


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
        assert settle([model], 32) == {model.name: []}
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
            # in_proj_a: transformers' own fp32 gradient is 4e-5 away from its float64 one, as ours is.
            for mine, other in zip(views[slot], theirs, strict=True):
                assert relative(mine, other) < (1e-4 if slot.endswith("in_proj_a") else 1e-5), slot

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_the_sampler_is_the_trainer(
        self, family: Callable[[str], Path], name: str, dtype: torch.dtype
    ) -> None:
        model = load(family(name), dtype)
        settle([model], 32)
        weights = make_run(model, 8).weights
        work = [
            (sample(f"s{i}", tokens(n, i), max_tokens=30, stop=(), seed=i), w)
            for i, (n, w) in enumerate(((70, weights), (3, None), (130, weights)))
        ]
        for (command, adapter), out in zip(work, run(Sampler(model, PLENTY), *work, gap=2), strict=True):
            prompt = np.frombuffer(command.prompt, np.int32).tolist()
            (sequence,) = out.sequences
            expected = trainer_logprobs(model, adapter, prompt + ids(sequence))
            if name not in RECURRENT:
                assert np.array_equal(lps(sequence), expected[len(prompt) - 1 :])
            else:
                near = 1e-5 if dtype is torch.float32 else 2e-2
                assert relative(lps(sequence), expected[len(prompt) - 1 :]) < near

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
