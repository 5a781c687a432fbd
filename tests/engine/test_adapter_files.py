"""Adapter folders: Tinker's names and shapes, and what is no adapter of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.tiny import load, make_run
from tests.families import make
from tinsmith.engine import adapter_files
from tinsmith.engine.runs import Run

CPU = torch.device("cpu")
LAYER = "base_model.model.model.layers.1."


def written(row: str, root: Path) -> tuple[Run, Path]:
    run = make_run(load(make(row, root)), rank=4)
    adapter_files.write(str(root / "a"), run.model, run.layout, run.live, optimizer=None, gradients=False)
    return run, root / "a"


def test_names_and_shapes_are_tinkers(tmp_path: Path) -> None:
    run, folder = written("Qwen3Moe", tmp_path)
    shapes = {name: list(x.shape) for name, x in load_file(folder / "adapter_model.safetensors").items()}
    of_layer = {n.removeprefix(LAYER): shape for n, shape in shapes.items() if n.startswith(LAYER)}
    assert of_layer == {
        "self_attn.q_proj.lora_A.weight": [4, 64],
        "self_attn.q_proj.lora_B.weight": [64, 4],
        "self_attn.k_proj.lora_A.weight": [4, 64],
        "self_attn.k_proj.lora_B.weight": [32, 4],
        "self_attn.v_proj.lora_A.weight": [4, 64],
        "self_attn.v_proj.lora_B.weight": [32, 4],
        "self_attn.o_proj.lora_A.weight": [4, 64],
        "self_attn.o_proj.lora_B.weight": [64, 4],
        # w1 is the gate, w3 up, w2 down; the factor on the hidden side belongs to all experts.
        "mlp.experts.w1.lora_A.weight": [1, 4, 64],
        "mlp.experts.w1.lora_B.weight": [8, 48, 4],
        "mlp.experts.w3.lora_A.weight": [1, 4, 64],
        "mlp.experts.w3.lora_B.weight": [8, 48, 4],
        "mlp.experts.w2.lora_A.weight": [8, 4, 48],
        "mlp.experts.w2.lora_B.weight": [1, 64, 4],
    }
    assert shapes["base_model.model.model.unembed_tokens.lora_A.weight"] == [4, 64]
    assert shapes["base_model.model.model.unembed_tokens.lora_B.weight"] == [512, 4]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 32.0, "LORA")
    assert config["base_model_name_or_path"] == "tests/Qwen3Moe"
    again = adapter_files.read(str(folder), run.layout, CPU, optimizer=False, gradients=False)
    assert torch.equal(again.params, run.live.params)


def test_a_matrix_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    run, folder = written("Llama", tmp_path)
    file = folder / "adapter_model.safetensors"
    name = LAYER + "mlp.up_proj.lora_A.weight"
    save_file({**load_file(file), name: torch.zeros(64, 4)}, file)
    with pytest.raises(adapter_files.FolderError, match=r"up_proj.lora_A.weight has the shape \[64, 4\]"):
        adapter_files.read(str(folder), run.layout, CPU, optimizer=False, gradients=False)
