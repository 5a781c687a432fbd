"""The config.json of published models, as far as it decides about sizes, and the sizes that they are said to
have.

Billions of parameters: all of them, and those that a token meets. Some makers do not count the embedding,
which a token only looks a row up in, among the latter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple


class Published(NamedTuple):
    config: dict
    total: float
    active: float
    counts_embedding: bool = True


_LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
_INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "group_size": 32,
                "strategy": "group",
                "symmetric": True,
                "actorder": None,
            },
        }
    },
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
    "quantization_status": "compressed",
}
_DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": _FP8,
    "rope_scaling": _YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
_KIMI = {
    **_DEEPSEEK,
    "model_type": "kimi_k2",
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "rope_scaling": {**_YARN, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
_GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 8,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        "quant_method": "mxfp4",
    },
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
_DELTA = {
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "num_key_value_heads": 2,
    "full_attention_interval": 4,
}
_TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16}


def _qwen3_5(kind: str, architecture: str, hidden: int, **text: object) -> dict:
    return {
        "architectures": [architecture],
        "model_type": kind,
        "image_token_id": 248056,
        "video_token_id": 248057,
        "vision_start_token_id": 248053,
        "vision_end_token_id": 248054,
        "tie_word_embeddings": False,
        "text_config": {
            **_DELTA,
            "model_type": f"{kind}_text",
            "hidden_size": hidden,
            "vocab_size": 248320,
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [11, 11, 10],
                "partial_rotary_factor": 0.25,
                "rope_theta": 10000000,
                "rope_type": "default",
            },
            **text,
        },
        "vision_config": {**_TOWER, "model_type": kind, "out_hidden_size": hidden},
    }


PUBLISHED = {
    "Llama-3.1-8B": Published(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rope_scaling": _LLAMA3,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "vocab_size": 128256,
        },
        8.03,
        8.03,
    ),
    "Qwen3-8B": Published(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_position_embeddings": 40960,
            "model_type": "qwen3",
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "tie_word_embeddings": False,
            "vocab_size": 151936,
        },
        8.19,
        8.19,
    ),
    "Qwen3-30B-A3B": Published(
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "vocab_size": 151936,
        },
        30.5,
        3.3,
    ),
    "Qwen3-Next-80B-A3B": Published(
        {
            **_DELTA,
            "architectures": ["Qwen3NextForCausalLM"],
            "decoder_sparse_step": 1,
            "hidden_size": 2048,
            "intermediate_size": 5120,
            "linear_num_value_heads": 32,
            "mlp_only_layers": [],
            "model_type": "qwen3_next",
            "moe_intermediate_size": 512,
            "norm_topk_prob": True,
            "num_attention_heads": 16,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "num_hidden_layers": 48,
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "shared_expert_intermediate_size": 512,
            "tie_word_embeddings": False,
            "vocab_size": 151936,
        },
        80,
        3.9,
    ),
    "Qwen3.5-27B": Published(
        _qwen3_5(
            "qwen3_5",
            "Qwen3_5ForConditionalGeneration",
            5120,
            intermediate_size=17408,
            linear_num_value_heads=48,
            num_attention_heads=24,
            num_hidden_layers=64,
            num_key_value_heads=4,
        ),
        27.4,
        27.4,
    ),
    "Qwen3.5-35B-A3B": Published(
        _qwen3_5(
            "qwen3_5_moe",
            "Qwen3_5MoeForConditionalGeneration",
            2048,
            linear_num_value_heads=32,
            moe_intermediate_size=512,
            num_attention_heads=16,
            num_experts=256,
            num_experts_per_tok=8,
            num_hidden_layers=40,
            shared_expert_intermediate_size=512,
        ),
        35,
        3.9,
    ),
    "Qwen3.5-397B-A17B": Published(
        _qwen3_5(
            "qwen3_5_moe",
            "Qwen3_5MoeForConditionalGeneration",
            4096,
            linear_num_value_heads=64,
            moe_intermediate_size=1024,
            num_attention_heads=32,
            num_experts=512,
            num_experts_per_tok=10,
            num_hidden_layers=60,
            shared_expert_intermediate_size=1024,
        ),
        397,
        17,
    ),
    "DeepSeek-V3": Published(_DEEPSEEK, 671, 37),
    "Kimi-K2-Instruct": Published(_KIMI, 1026, 32.5),
    "Kimi-K2-Thinking": Published({**_KIMI, "quantization_config": _INT4}, 1026, 32.5),
    "gpt-oss-20b": Published(
        {**_GPT_OSS, "num_hidden_layers": 24, "num_local_experts": 32}, 20.9, 3.6, counts_embedding=False
    ),
    "gpt-oss-120b": Published(
        {**_GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128}, 116.8, 5.1, counts_embedding=False
    ),
    "Nemotron-H-8B": Published(
        {
            "architectures": ["NemotronHForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
                "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
            },
            "attention_head_dim": 128,
            "chunk_size": 256,
            "conv_kernel": 4,
            "expand": 2,
            "head_dim": 128,
            "hidden_size": 4096,
            "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
            "intermediate_size": 21504,
            "mamba_head_dim": 64,
            "mamba_num_heads": 128,
            "max_position_embeddings": 8192,
            "model_type": "nemotron_h",
            "n_groups": 8,
            "num_attention_heads": 32,
            "num_hidden_layers": 52,
            "num_key_value_heads": 8,
            "ssm_state_size": 128,
            "tie_word_embeddings": False,
            "vocab_size": 131072,
        },
        8.1,
        8.1,
    ),
    "Nemotron-3-Nano-30B-A3B": Published(
        {
            "architectures": ["NemotronHForCausalLM"],
            "chunk_size": 128,
            "conv_kernel": 4,
            "expand": 2,
            "head_dim": 128,
            "hidden_size": 2688,
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "intermediate_size": 1856,
            "mamba_head_dim": 64,
            "mamba_num_heads": 64,
            "max_position_embeddings": 262144,
            "model_type": "nemotron_h",
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "n_groups": 8,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 52,
            "num_key_value_heads": 2,
            "routed_scaling_factor": 2.5,
            "ssm_state_size": 128,
            "tie_word_embeddings": False,
            "vocab_size": 131072,
        },
        31.6,
        3.6,
    ),
}


def write(name: str, root: Path) -> Path:
    """A folder with the config alone."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name].config))
    return folder
