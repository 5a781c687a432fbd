"""The model families that tests build, with every feature that their config classes have: a family a row.

A row is transformers' name of the family, with a remark behind a dash where it stands twice, and the settings
of its config. The code under test names none of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.engine.tiny import SIZES, make_family
from tests.quantized import quantize

HEAD = {"head_dim": 16}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
# Twice the experts' width must not be the hidden size: converters tell the two apart by their sizes.
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
SHARED = {"num_experts": 8, "shared_expert_intermediate_size": 32}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "Llama": {**SIZES, "rope_parameters": LLAMA3},
    "Llama-tied": {**SIZES, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "Qwen3": {**SIZES, **HEAD},
    "Qwen3Moe": {**SIZES, **HEAD, **EXPERTS, "num_experts": 8},
    "Qwen3_5Text": {**SIZES, **HEAD, **DELTA},
    "Qwen3_5MoeText": {**SIZES, **HEAD, **DELTA, **EXPERTS, **SHARED},
    "Qwen3Next": {**SIZES, **HEAD, **DELTA, **EXPERTS, **SHARED},
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
    "GptOss": {**SIZES, **HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "Mistral": {**SIZES, **HEAD, "sliding_window": 8},
    "Olmo3": SIZES,
    "Phi3": {**SIZES, "pad_token_id": 0},
    "Gemma2": {**SIZES, **HEAD, **WINDOWS},
    "Gemma3Text": {**SIZES, **HEAD, **WINDOWS},
    "Lfm2": {**SIZES, "layer_types": ["conv", "full_attention"]},
}
# Their layers take one token and many by different formulas: the sampler agrees with the trainer within
# rounding, where others agree bit for bit.
RECURRENT = {"Qwen3_5Text", "Qwen3_5MoeText", "Qwen3Next", "NemotronH", "KimiLinear"}
GENERIC = {"Gemma2"}  # through transformers' own attention and cache, and within rounding, too


# Rows as they are published: the format of the weights, and what config.json says beside it.
QUANTIZED: dict[str, tuple[str, dict]] = {
    "DeepseekV3-fp8": ("fp8", {}),
    "DeepseekV3-kimi_k2": ("int4", {"model_type": "kimi_k2"}),
    "GptOss-mxfp4": ("mxfp4", {}),
}


def make(row: str, root: Path) -> Path:
    """The folder of a row's model, made in `root` on its first use; `tests.quantized.full` of it is what
    transformers gives the same from."""
    if not (root / row).exists():
        if row in QUANTIZED:
            name, config = QUANTIZED[row]
            return quantize(make(row.partition("-")[0], root), root / row, name, **config)
        make_family(row.partition("-")[0], "ForCausalLM", root / row, FAMILIES[row])
    return root / row


_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OddConfig(LlamaConfig):
    model_type = "odd"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.norm.variance_epsilon = 3.0  # what nobody would guess
"""


def make_odd(llama: Path, folder: Path) -> Path:
    """A model whose architecture is code that lies beside its weights."""
    shutil.copytree(llama, folder)
    (folder / "odd.py").write_text(_CODE)
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    config |= {"model_type": "odd", "architectures": ["OddForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
