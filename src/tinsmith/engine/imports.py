"""Adapters that come from elsewhere: nothing of such a folder is believed before it was looked at."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinsmith.engine import adapter_files
from tinsmith.engine.adapter_files import CONFIG, PREFIX, WEIGHTS, FolderError
from tinsmith.engine.commands import LoraSpec
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.lora import Layout
from tinsmith.engine.runs import State

_FLOATS = {"F64", "F32", "F16", "BF16"}
# Settings of PEFT's LoraConfig with which the same matrices mean something else.
_NOT_PLAIN = (
    "use_dora", "use_rslora", "use_qalora", "use_bdlora", "modules_to_save", "rank_pattern", "alpha_pattern",
    "lora_bias", "layer_replication", "trainable_token_indices", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva"),  # others change the base's weights, too
}


def import_adapter(source: str, path: str, model: BaseModel, spec: LoraSpec) -> dict[str, object]:
    """Write the new checkpoint folder `path` of what is in `source`.

    Raises FolderError, which says what does not suit the model or `spec`, and by which name.
    """
    alpha = _read_config(Path(source) / CONFIG, model, spec)
    layout = Layout(model.slots, replace(spec, alpha=alpha))
    params = torch.empty(layout.size, dtype=torch.float32)
    try:
        with safe_open(Path(source) / WEIGHTS, framework="pt") as file:
            _read_weights(file, adapter_files.named(layout, params))
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{WEIGHTS} is no safetensors file: {error}") from error
    size = adapter_files.write(path, model, layout, State(params), optimizer=None, gradients=False)
    return {"size_bytes": size, "alpha": alpha}


def _read_config(file: Path, model: BaseModel, spec: LoraSpec) -> float:
    """The adapter's alpha."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"{CONFIG} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise FolderError(f"{CONFIG} is no JSON object")
    if config.get("r") != spec.rank:
        raise FolderError(f"{CONFIG}: r is {config.get('r')!r}, and lora_config.rank was {spec.rank}")
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise FolderError(f"{CONFIG}: lora_alpha must be a number greater than 0, not {alpha!r}")
    for name in _NOT_PLAIN:
        if config.get(name):
            raise FolderError(f"{CONFIG}: {name} is set; only plain LoRA adapters are taken")
    for name, plain in _PLAIN.items():
        if config.get(name) not in (None, *plain):
            shown = ", ".join(json.dumps(value) for value in plain)
            raise FolderError(
                f"{CONFIG}: {name} is {str(config[name])[:80]!r}; only plain LoRA adapters are taken,"
                f" whose {name} is {shown}"
            )
    own = config.get("tinsmith")
    if isinstance(own, dict) and own.get("fingerprint") not in (None, model.fingerprint):
        raise FolderError(
            f"this adapter was trained on another base model ({str(own['fingerprint'])[:12]}) than what is"
            f" served as {model.name} ({model.fingerprint[:12]})"
        )
    return float(alpha)


def _read_weights(file: Any, expected: dict[str, Tensor]) -> None:
    there = {_tinkers(name): name for name in file.keys()}  # noqa: SIM118
    for name in sorted(expected.keys() - there.keys())[:1]:
        raise FolderError(f"{WEIGHTS} lacks {name}, which this base model and lora_config have")
    for name in sorted(there.keys() - expected.keys()):
        # A part that a model does not have may stand there empty.
        if math.prod(file.get_slice(there[name]).get_shape()):
            raise FolderError(
                f"{WEIGHTS} has {there[name]}, which this base model and lora_config do not have"
            )
    for name, view in expected.items():
        stored = file.get_slice(there[name])
        shape, dtype = list(stored.get_shape()), stored.get_dtype()
        if shape != list(view.shape):
            raise FolderError(f"{WEIGHTS}: {there[name]} has the shape {shape}, not {list(view.shape)}")
        if dtype not in _FLOATS:
            raise FolderError(f"{WEIGHTS}: {there[name]} is {dtype}; weights are F32, BF16 or F16")
        view.copy_(file.get_tensor(there[name]))
        if not bool(torch.isfinite(view).all()):
            raise FolderError(f"{WEIGHTS}: {there[name]} has values that are not finite")


def _tinkers(name: str) -> str:
    """A tensor's name as this server writes it; the hosted service has had others."""
    for old, new in (
        (f"{PREFIX}lm_head.", f"{PREFIX}model.unembed_tokens."),
        (".attn.", ".self_attn."),  # GPT-OSS
    ):
        name = name.replace(old, new)
    return name
