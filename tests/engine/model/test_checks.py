"""Which architectures are served is found out at load; what would be computed wrongly is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.engine.tiny import SIZES, load, make_tokenizer
from tinsmith.engine.model.base import ModelError
from tinsmith.engine.model.checks import check

HEAD = {"head_dim": 16}
SERVED = {
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


def build(name: str, suffix: str, folder: Path, settings: dict) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    getattr(transformers, f"{name}{suffix}")(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SERVED)
def test_families_with_plain_attention_are_served(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    check(load(build(name, "ForCausalLM", tmp_path / name, SERVED[name]), dtype))


@pytest.mark.parametrize(
    ("name", "suffix", "settings", "why"),
    [
        ("Gemma2", "ForCausalLM", {**SIZES, **HEAD}, "Gemma2Attention caps its attention scores"),
        (
            "Mamba2",
            "ForCausalLM",
            {
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "vocab_size": 512,
                "num_heads": 8,
                "head_dim": 16,
                "state_size": 16,
                "n_groups": 1,
            },
            "no linear layer that counts as attn|only 0 of them are attention",
        ),
        (
            "GPT2",
            "LMHeadModel",
            {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512, "n_positions": 512},
            "no linear layer that counts as attn",
        ),
    ],
)
def test_what_would_be_wrong_is_refused_by_name(
    name: str, suffix: str, settings: dict, why: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=why) as refused:
        check(load(build(name, suffix, tmp_path / name, settings)))
    assert name in str(refused.value)
