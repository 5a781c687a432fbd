"""Adapter folders: what a checkpoint is on disk.

adapter_model.safetensors  A and B of every slot, fp32, under Tinker's names and in its shapes:
                           A [r, in], B [out, r]; those of experts [experts, r, in] and
                           [experts, out, r], where a factor that all of them share has experts = 1
adapter_config.json        the LoRA settings, the base model, and a digest of the weights
optimizer.safetensors      the optimizer's moments (training checkpoints; its metadata has the step count)
gradients.safetensors      accumulated gradients (runs that were put away whole)

A folder appears with all of its files or not at all. In one that was encrypted all have the suffix .age.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tinsmith.engine import encryption
from tinsmith.engine.commands import LoraSpec
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.lora import Layout
from tinsmith.engine.runs import State
from tinsmith.wire.optimizers import Family

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OPTIMIZER, GRADIENTS = "optimizer.safetensors", "gradients.safetensors"


class FolderError(Exception):
    """An adapter folder cannot be written or read; the message says which and why."""


class WriteError(FolderError):
    """A folder could not be written, through no fault of the request: a full disk, say."""


def write(
    path: str,
    model: BaseModel,
    layout: Layout,
    state: State,
    *,
    optimizer: Family | None,
    gradients: bool,
    recipients: Sequence[Any] = (),
    durable: bool = True,
) -> int:
    """Write a new folder at `path`, with the moments of the run's `optimizer` unless that is None, encrypted
    to `recipients` if there are any, on the disk if `durable`; returns its size in bytes. Raises FolderError,
    and leaves nothing then."""
    target = Path(path)
    if target.exists():
        raise FolderError(f"{path} exists already")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        temporary.mkdir(parents=True)
        _save(temporary / WEIGHTS, named(layout, state.params))
        if optimizer is not None and state.first is not None:
            moments = {"first": state.first, "second": state.second}
            there = {name: moment for name, moment in moments.items() if moment is not None}
            _save(temporary / OPTIMIZER, there, {"step": str(state.step)})
        if gradients and state.gradient is not None:
            _save(temporary / GRADIENTS, {"gradient": state.gradient})
        spec = layout.spec
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": model.name,
            "r": spec.rank,
            "lora_alpha": spec.alpha,
            "bias": "none",
            "target_modules": sorted({s.name.rpartition(".")[2] for s in layout.slots}),
            "tinsmith": {
                **dataclasses.asdict(spec),
                **({"optimizer": optimizer} if optimizer is not None else {}),
                "fingerprint": model.fingerprint,
                "digest": hashlib.sha256(state.params.cpu().numpy().data).hexdigest(),
            },
        }
        (temporary / CONFIG).write_text(json.dumps(config, indent=2))
        if recipients:
            encryption.seal(temporary, recipients)
        for file in temporary.iterdir() if durable else ():
            sync(file)
        if durable:
            sync(temporary)
        size = sum(f.stat().st_size for f in temporary.iterdir())
        os.rename(temporary, target)
        if durable:
            sync(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise WriteError(
            f"the checkpoint could not be written: {reason}. Earlier checkpoints are intact"
        ) from error
    return size


def read_spec(path: str, model: BaseModel) -> tuple[LoraSpec, str]:
    """The adapter's settings and digest. Raises FolderError, also if it belongs to another base model."""
    if (Path(path) / f"{CONFIG}{encryption.SUFFIX}").exists():
        raise FolderError(
            "the checkpoint is encrypted to age recipients, and the server has no key of theirs; it can be"
            " downloaded, and decrypted with age -d"
        )
    own = _own_config(path)
    own.pop("optimizer", None)
    fingerprint, digest = own.pop("fingerprint"), own.pop("digest")
    if fingerprint != model.fingerprint:
        raise FolderError(
            f"the checkpoint was made on another base model ({fingerprint[:12]}) than what is {model.name}"
            f" here ({model.fingerprint[:12]}); take the base that it was made on"
        )
    return LoraSpec(**own), digest


def read_optimizer(path: str) -> Family:
    """The optimizer of the run that the folder was made of. Raises FolderError."""
    family: Family = _own_config(path).get("optimizer", "adamw")
    return family


def _own_config(path: str) -> dict[str, Any]:
    try:
        return dict(json.loads((Path(path) / CONFIG).read_text())["tinsmith"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(f"the checkpoint cannot be read: {type(error).__name__}: {error}") from error


def read(path: str, layout: Layout, device: torch.device, *, optimizer: bool, gradients: bool) -> State:
    """Read weights and, where asked for, moments and gradients. Raises FolderError."""
    folder = Path(path)
    try:
        state = State(torch.empty(layout.size, dtype=torch.float32))
        with safe_open(folder / WEIGHTS, framework="pt") as f:
            for name, view in named(layout, state.params).items():
                tensor = f.get_tensor(name)
                if tensor.numel() != view.numel() or tensor.shape[-2:] != view.shape[-2:]:
                    raise FolderError(
                        f"the checkpoint cannot be read: {name} has the shape {list(tensor.shape)}, and"
                        f" {list(view.shape)} was expected"
                    )
                view.copy_(tensor.view(view.shape))
        if optimizer and (folder / OPTIMIZER).exists():
            with safe_open(folder / OPTIMIZER, framework="pt") as f:
                state.first = f.get_tensor("first")
                state.second = f.get_tensor("second") if "second" in f.keys() else None  # noqa: SIM118
                state.step = int(f.metadata()["step"])
        if gradients and (folder / GRADIENTS).exists():
            with safe_open(folder / GRADIENTS, framework="pt") as f:
                state.gradient = f.get_tensor("gradient")
    except (OSError, SafetensorError, RuntimeError) as error:
        raise FolderError(f"the checkpoint cannot be read: {error}") from error
    return state.to(device)


def remove(path: str) -> None:
    """Delete a folder that nothing refers to any more."""
    shutil.rmtree(path, ignore_errors=True)


def named(layout: Layout, flat: Tensor) -> dict[str, Tensor]:
    """Views of `flat` under the names and in the shapes that the file has."""
    named: dict[str, Tensor] = {}
    views = layout.views(flat)
    for slot in layout.slots:
        for part, factor in zip("AB", views[slot.name], strict=True):
            shared = slot.experts and factor.dim() == 2
            named[f"{PREFIX}{slot.name}.lora_{part}.weight"] = factor.unsqueeze(0) if shared else factor
    return named


def _save(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    save_file(
        {k: v.detach().cpu().clone() for k, v in tensors.items()}, file, {"format": "pt", **(metadata or {})}
    )


def sync(path: Path) -> None:
    """Have a file, or a folder's list of files, on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
