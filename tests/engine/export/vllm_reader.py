"""An adapter folder read as vLLM reads it, and added to the tensors of a base's files.

vLLM: the module's name is the key's without `base_model.model.` and `.lora_A.weight`; names of modules are
those of the base's files; the only scaling is lora_alpha / r; a matrix has at most r rows.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)")


def merge_as_vllm(base: Path, adapter: Path, out: Path) -> None:
    shutil.copytree(base, out)
    tensors = load_file(base / "model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    kind = json.loads((base / "config.json").read_text())["model_type"]
    factors = load_file(adapter / "adapter_model.safetensors")
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in factors}
    assert {name.rpartition(".")[2] for name in modules} == set(config["target_modules"])
    assert not any(name in config for name in ("rank_pattern", "alpha_pattern", "target_parameters"))
    for module in modules:
        a, b = (factors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        assert a.dim() == b.dim() == 2
        assert len(a) <= config["r"]
        delta = b @ a * (config["lora_alpha"] / config["r"])
        name = module.replace("model.layers.", "backbone.layers.") if kind == "nemotron_h" else module
        if f"{name}.weight" in tensors:
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + delta
        else:
            _add_to_experts(tensors, name, delta, interleaved=kind == "gpt_oss")
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def _add_to_experts(tensors: dict[str, Tensor], name: str, delta: Tensor, *, interleaved: bool) -> None:
    """Where the files have all experts in one tensor: [experts, out, in], or GPT-OSS's [experts, in, out],
    with gate and up in turns."""
    match = _EXPERT.fullmatch(name)
    assert match, name
    prefix, expert, projection = match.groups()
    whole = tensors[f"{prefix}.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"]
    own = whole[int(expert)].T if interleaved else whole[int(expert)]
    half = own.shape[0] // 2
    rows = {
        "down_proj": slice(None),
        "gate_proj": slice(0, None, 2) if interleaved else slice(0, half),
        "up_proj": slice(1, None, 2) if interleaved else slice(half, None),
    }[projection]
    own[rows] += delta
