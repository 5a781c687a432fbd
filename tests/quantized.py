"""Checkpoints quantized as they are published, from full ones, and what their weights come to.

The arithmetic is the formats' own, in numpy and number by number where that is clearest; nothing of it is
shared with the code under test.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PROJECTION = re.compile(r"layers\.\d+\..*_proj(_with_mqa)?\.weight$")
EXPERT = re.compile(r"\.experts\.\d+\..*_proj\.weight$")
FULL = "full"  # a folder inside: the same model, its weights as the quantized ones come to
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

# A quantizer makes of a name and a weight the tensors that are stored, and the weight that they come to.
Quantizer = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]


def fp8_blocks(size: int) -> Quantizer:
    """DeepSeek-V3's: e4m3 with a scale for every `size` x `size` weights, the last blocks smaller."""

    def quantize(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        scales = torch.zeros(-(-rows // size), -(-columns // size))
        stored, full = torch.zeros(rows, columns), torch.zeros(rows, columns)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
                scales[i, j] = weight[part].abs().max() / 448
                stored[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn).float()
                full[part] = stored[part] * scales[i, j]
        return {name: stored.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}, full

    return quantize


def bytes_with_scale(dtype: torch.dtype, kind: str, end: str = "_scale") -> Quantizer:
    """FP8 or INT8 with one scale for a tensor or for each row ("tensor", "scalar", "channel")."""
    most = 127.0 if dtype is torch.int8 else 448.0

    def quantize(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / most
        if kind != "channel":
            scale = scale.max().view(1)
        stored = (weight / scale).round() if dtype is torch.int8 else weight / scale
        stored = stored.to(dtype)
        full = stored.float() * scale
        if kind == "scalar":
            scale = scale[0]
        return {name: stored, name + end: scale, name.replace("weight", "input_scale"): torch.ones(1)}, full

    return quantize


def packed(bits: int, group: int) -> Quantizer:
    """compressed-tensors' pack-quantized: integers plus 2^(bits-1), the first in a word's lowest bits."""

    def quantize(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        half, each = 2 ** (bits - 1), 32 // bits
        groups = weight.view(rows, -1, group)
        scale = (groups.abs().amax(-1) / (half - 1)).bfloat16()
        numbers = (groups / scale.float()[..., None]).round().clamp(-half, half - 1)
        full = (numbers * scale.float()[..., None]).view(rows, columns)
        words = np.zeros((rows, -(-columns // each)), np.int64)
        unsigned = (numbers.view(rows, columns) + half).numpy().astype(np.int64)
        for column in range(columns):
            words[:, column // each] += unsigned[:, column] << (bits * (column % each))
        stored = torch.from_numpy(words.astype(np.uint32).view(np.int32))
        return {
            f"{name}_packed": stored,
            f"{name}_scale": scale,
            f"{name}_shape": torch.tensor([rows, columns]),
        }, full

    return quantize


def mxfp4(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """GPT-OSS's experts, whose full weights [experts, in, out] are stored with `in` last, in blocks of 32."""
    values = weight.transpose(1, 2).contiguous().numpy()
    experts, out, width = values.shape
    blocks = values.reshape(experts, out, width // 32, 32)
    exponent = np.floor(np.log2(np.abs(blocks).max(-1, keepdims=True))) - 2
    index = np.abs(blocks[..., None] / 2.0 ** exponent[..., None] - E2M1).argmin(-1)
    full = torch.from_numpy((E2M1[index] * 2.0**exponent).astype(np.float32).reshape(values.shape))
    halves = index.astype(np.uint8).reshape(experts, out, width // 32, 16, 2)
    return {
        f"{name}_blocks": torch.from_numpy(halves[..., 0] | (halves[..., 1] << 4)),
        f"{name}_scales": torch.from_numpy((exponent[..., 0] + 127).astype(np.uint8)),
    }, full.transpose(1, 2).contiguous()


def compressed(fmt: str, bits: int, kind: str = "int", group: int | None = None, **weights: object) -> dict:
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": bits,
                    "type": kind,
                    "group_size": group,
                    "strategy": "group" if group else "channel",
                    "symmetric": True,
                    **weights,
                },
            }
        },
        "ignore": ["lm_head"],
    }


# By name: which weights, how, and what config.json says about it.
FORMATS: dict[str, tuple[re.Pattern[str], Quantizer, dict]] = {
    "fp8": (PROJECTION, fp8_blocks(48), {"quant_method": "fp8", "weight_block_size": [48, 48]}),
    "fp8-tensor": (
        PROJECTION,
        bytes_with_scale(torch.float8_e4m3fn, "scalar", "_scale_inv"),
        {"quant_method": "fp8", "activation_scheme": "static"},
    ),
    "fp8-row": (PROJECTION, bytes_with_scale(torch.float8_e4m3fn, "channel"), {"quant_method": "fbgemm_fp8"}),
    "modelopt": (
        PROJECTION,
        bytes_with_scale(torch.float8_e4m3fn, "tensor"),
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ),
    "ct-fp8": (
        PROJECTION,
        bytes_with_scale(torch.float8_e4m3fn, "channel"),
        compressed("float-quantized", 8, "float"),
    ),
    "ct-int8": (PROJECTION, bytes_with_scale(torch.int8, "channel"), compressed("int-quantized", 8)),
    "int4": (EXPERT, packed(4, 16), compressed("pack-quantized", 4, group=16)),
    "int8": (PROJECTION, packed(8, 16), compressed("pack-quantized", 8, group=16)),
    "mxfp4": (re.compile(r"experts\.\w+_proj$"), mxfp4, {"quant_method": "mxfp4"}),
}


def quantize(source: Path, folder: Path, name: str, **config: object) -> Path:
    """A model's folder with its weights in one of FORMATS, and `config` in its config.json; FULL is in it."""
    which, quantizer, settings = FORMATS[name]
    stored: dict[str, Tensor] = {}
    full: dict[str, Tensor] = {}
    for key, weight in load_file(source / "model.safetensors").items():
        if which.search(key):
            made, full[key] = quantizer(key, weight.float())
            stored |= made
        else:
            stored[key] = full[key] = weight
    assert len(stored) > len(full)
    said = json.loads((source / "config.json").read_text())
    for target, tensors, more in (
        (folder / FULL, full, {}),
        (folder, stored, {"quantization_config": settings, **config}),
    ):
        shutil.copytree(source, target, dirs_exist_ok=True)
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors", {"format": "pt"}
        )
        (target / "config.json").write_text(json.dumps({**said, **more}))
    return folder


def full(folder: Path) -> Path:
    """Where a model lies with full weights: the folder itself if it is not quantized."""
    return folder / FULL if (folder / FULL).is_dir() else folder
