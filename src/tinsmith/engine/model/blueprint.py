"""A model as its config alone describes it: built by transformers on torch's meta device, without weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tinsmith.engine.model import quantization
from tinsmith.engine.model.checkpoint import INDEX, SINGLE, read_json
from tinsmith.engine.model.errors import ModelError, short
from tinsmith.engine.model.vision import attention_of, auto_class

# Model types that transformers has under another name.
_ALIASES = {"kimi_k2": "deepseek_v3"}
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")  # of a hub id, all but its weights


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model of which only the config is known: `module` lies on the meta device. `quantized` names the
    format of its weights, empty where they are full ones."""

    folder: Path
    raw: Mapping[str, Any]  # its config.json
    config: Any
    module: Any
    quantized: str
    remote: bool  # whether it is built by code from its folder

    @property
    def nbytes(self) -> int:
        """What its weights need in memory."""
        return sum(p.numel() * p.element_size() for p in self.module.parameters())


def draw(path: str, dtype: torch.dtype, *, trust_remote_code: bool = False, whole: bool = False) -> Blueprint:
    """Of what lies in a folder or under a hub id; for `whole` see `fetch`. Raises ModelError."""
    folder = fetch(path, whole, trust_remote_code)
    raw = read_json(folder / "config.json")
    try:
        quantized = quantization.recognise(raw)
    except ModelError as error:
        raise ModelError(f"{folder / 'config.json'}: {error}") from None
    remote = _needs_code(folder, raw, trust_remote_code)
    config = _config(folder, raw, remote)
    auto = auto_class(config)
    if not remote and type(config) not in auto._model_mapping:
        raise ModelError(
            f"{folder}: {_architecture(raw)} is no language model that generates text with transformers "
            f"{transformers.__version__}"
        )
    try:
        with torch.device("meta"):
            module = auto.from_config(
                config, dtype=dtype, attn_implementation=attention_of(config), trust_remote_code=remote
            )
    except Exception as error:
        reason = short(error)
        if isinstance(error, KeyError) and error.args == ("tinsmith",):
            reason = "it takes attention from a table of its own, not from transformers' AttentionInterface"
        raise ModelError(
            f"{folder / 'config.json'}: no {_architecture(raw)} can be built from it: {reason}"
        ) from error
    use_own_experts(module)
    return Blueprint(folder, raw, config, module.eval(), quantized, remote)


def fetch(path: str, whole: bool, trust_remote_code: bool) -> Path:
    """Where the files lie: the folder itself, or the snapshot of a hub id, of which the config is there then,
    and if it is to be `whole`, tokenizer and weights. Raises ModelError."""
    local = Path(path)
    try:
        if local.is_dir():
            if not (local / "config.json").is_file():
                raise ModelError(
                    f"{path} has no config.json, so it is no model folder in Hugging Face layout"
                )
            return local
        if local.exists():
            raise ModelError(f"{path} is a file; a model is a folder in Hugging Face layout, or a hub id")
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    if os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1:
        raise ModelError(f"there is no folder {path}")
    small = [*(_SMALL_FILES if whole else ("config.json",)), *(("*.py",) if trust_remote_code else ())]
    try:
        folder = Path(huggingface_hub.snapshot_download(path, allow_patterns=small))
        if whole and (folder / INDEX).is_file():
            names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
            huggingface_hub.snapshot_download(path, allow_patterns=names)
        elif whole:
            huggingface_hub.snapshot_download(path, allow_patterns=[SINGLE])
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{path} is no folder here, and not to be had from the hub: {short(error)}"
        ) from error
    if not (folder / "config.json").is_file():
        raise ModelError(f"{path} has no config.json on the hub, so it is no model in Hugging Face layout")
    return folder


def _architecture(raw: Mapping[str, Any]) -> str:
    named = raw.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else str(raw.get("model_type"))


def _needs_code(folder: Path, raw: Mapping[str, Any], trust_remote_code: bool) -> bool:
    """Whether only code from its own folder can build a model. Raises ModelError where that may not run."""
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"{folder / 'config.json'} has no model_type, so it is no model's config")
    kind = _ALIASES.get(kind, kind)
    auto_map = raw.get("auto_map")
    code = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, Mapping) else None
    if code is None:
        if kind in CONFIG_MAPPING:
            return False
        raise ModelError(
            f"{folder / 'config.json'}: the model type {kind!r} ({_architecture(raw)}) is unknown to "
            f"transformers {transformers.__version__}; newer versions may know it"
        )
    if kind in CONFIG_MAPPING:
        config = CONFIG_MAPPING[kind]
        known = {
            model.__name__
            for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
            if config in auto._model_mapping
            for model in _models(auto._model_mapping[config])
        }
        same = _architecture(raw).replace("_", "").lower() in {n.replace("_", "").lower() for n in known}
        return trust_remote_code and not same
    if not trust_remote_code:
        raise ModelError(
            f"{folder}: {_architecture(raw)} (model type {kind!r}) is code of the checkpoint's own "
            f"({str(code).rpartition('.')[0]}.py) and not part of transformers {transformers.__version__}. "
            "It runs only with --trust-remote-code: set that if you trust whoever wrote it"
        )
    return True


def _models(found: Any) -> tuple[Any, ...]:
    return tuple(found) if isinstance(found, list | tuple) else (found,)


def _config(folder: Path, raw: Mapping[str, Any], remote: bool) -> Any:
    kind = raw["model_type"]
    try:
        if not remote and kind in _ALIASES:
            config = CONFIG_MAPPING[_ALIASES[kind]].from_dict({**raw, "model_type": _ALIASES[kind]})
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=remote)
        config._name_or_path = str(folder)
    except Exception as error:
        raise ModelError(f"{folder / 'config.json'} is no valid config: {short(error)}") from error
    # What is quantized in the files is not in memory, see quantization.py.
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            if hasattr(part, key):
                delattr(part, key)
    return config


def use_own_experts(module: Any) -> None:
    for config in (module.config, module.config.get_text_config()):
        config._experts_implementation = "tinsmith"
