"""Sampling weights: immutable snapshots under their ids, shared where they are the same.

Nobody closes a sampler, so snapshots live under a bound: the least recently used leave memory and
come back from their checkpoint's folder, or from a file that is written when they leave.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinsmith.engine import adapter_files
from tinsmith.engine.adapter_files import FolderError
from tinsmith.engine.commands import LoraSpec
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.lora import AdapterWeights, Layout
from tinsmith.engine.runs import State

HOST = torch.device("cpu")
Read = State | dict[str, Tensor]  # of a checkpoint's folder, or of a file that was written for want of room


@dataclass(slots=True)
class Snapshot:
    """One sampler's weights: resident, or to be had from `folder` (a checkpoint) or `spilled` (a file)."""

    model: BaseModel
    layout: Layout
    weights: AdapterWeights | None
    folder: str | None = None
    spilled: Path | None = None
    used: int = 0


@dataclass(slots=True)
class Snapshots:
    """All samplers of an engine, by id."""

    spill_dir: Path
    entries: dict[str, Snapshot] = field(default_factory=dict)
    _digests: WeakValueDictionary[tuple[str, str], AdapterWeights] = field(
        default_factory=WeakValueDictionary
    )

    def publish(
        self, name: str, model: BaseModel, layout: Layout, weights: AdapterWeights, folder: str | None
    ) -> None:
        """A name that is there already gets the new weights: samples under way keep those they began with."""
        self.release(name)
        self.entries[name] = Snapshot(model, layout, weights, folder)
        if folder is not None:
            self._digests[self._key(folder, model)] = weights

    def open(self, name: str, model: BaseModel, folder: str) -> None:
        """Raises FolderError."""
        known = self.entries.get(name)
        if known is not None and folder in (known.folder, str(known.spilled)):
            return
        if Path(folder).is_file():
            self.entries[name] = Snapshot(model, _layout_of(folder, model), None, spilled=Path(folder))
            return
        spec, _ = adapter_files.read_spec(folder, model)
        self.entries[name] = Snapshot(model, Layout(model.slots, spec), None, folder)

    def put(self, name: str, path: str) -> bool:
        """Write the weights of a sampler that has no folder into a new file, for `open`. False where there is
        none to write. Raises FolderError."""
        entry = self.entries.get(name)
        if entry is None or entry.folder is not None:
            return False
        about = {"lora": json.dumps(dataclasses.asdict(entry.layout.spec)), "base": _base_of(entry.model)}
        part = Path(path).with_name(f".{Path(path).name}")
        try:
            if entry.weights is None:
                assert entry.spilled is not None
                tensors = load_file(entry.spilled)
            else:
                tensors = entry.weights.tensors()
            save_file(tensors, part, about)
            adapter_files.sync(part)
            part.rename(path)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise FolderError(f"the sampler's weights could not be written: {error}") from error
        return True

    def weights(self, name: str, clock: int) -> tuple[BaseModel, AdapterWeights]:
        """The sampler's weights, brought back where they had to make room. Raises KeyError, FolderError."""
        entry = self.entries[name]
        entry.used = clock
        if (read := self.absent(name)) is not None:
            self.bring_back(entry, read())
        assert entry.weights is not None
        return entry.model, entry.weights

    def absent(self, name: str) -> Callable[[], Read] | None:
        """Where the sampler's weights are not in memory, and not to be had from another one's: the function
        that reads them, for `bring_back`; it knows no device. Raises KeyError, FolderError."""
        entry = self.entries[name]
        if entry.weights is not None:
            return None
        if entry.folder is None:
            if entry.spilled is None:
                raise FolderError("the sampler's weights are gone")
            spilled = entry.spilled
            return lambda: load_file(spilled)
        entry.weights = self._digests.get(self._key(entry.folder, entry.model))
        if entry.weights is not None:
            return None
        folder, layout = entry.folder, entry.layout
        return lambda: adapter_files.read(folder, layout, HOST, optimizer=False, gradients=False)

    def bring_back(self, entry: Snapshot, found: Read) -> None:
        """Make the weights of what was read of them, unless they have become known meanwhile."""
        model = entry.model
        if isinstance(found, dict):
            entry.weights = AdapterWeights.restore(found, model.device)
            return
        assert entry.folder is not None
        key = self._key(entry.folder, model)
        weights = self._digests.get(key)
        if weights is None:
            params = found.params.to(model.device)
            weights = AdapterWeights(entry.layout, params, model.dtype, model.device)
            self._digests[key] = weights
        entry.weights = weights

    def _key(self, folder: str, model: BaseModel) -> tuple[str, str]:
        spec, digest = adapter_files.read_spec(folder, model)
        return model.name, f"{spec}:{digest}"

    def evict(self, name: str) -> None:
        """Let the weights leave memory; they are written first where no folder has them."""
        entry = self.entries[name]
        if entry.weights is None:
            return
        if entry.folder is None and entry.spilled is None:
            self.spill_dir.mkdir(parents=True, exist_ok=True)
            file = self.spill_dir / f"sampler-{uuid.uuid4().hex}.safetensors"
            save_file(entry.weights.tensors(), file)
            entry.spilled = file
        entry.weights = None

    def release(self, name: str) -> AdapterWeights | None:
        """Forget a sampler; returns its weights if they were resident."""
        entry = self.entries.pop(name, None)
        if entry is None:
            return None
        if entry.spilled is not None:
            entry.spilled.unlink(missing_ok=True)
        return entry.weights


def _base_of(model: BaseModel) -> str:
    """What a sampler's bits are good for: sampling weights are in the model's dtype."""
    return f"{model.fingerprint} {model.dtype}"


def _layout_of(file: str, model: BaseModel) -> Layout:
    """Of a file that `put` wrote. Raises FolderError, also if it belongs to another base model."""
    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
            base, spec = about["base"], LoraSpec(**json.loads(about["lora"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FolderError(f"the sampler's weights cannot be read: {error}") from error
    if base != _base_of(model):
        raise FolderError(f"the sampler's weights were made on another base than what is {model.name} here")
    return Layout(model.slots, spec)
