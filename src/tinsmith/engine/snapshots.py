"""Sampling weights: immutable snapshots under their ids, shared where they are the same.

Nobody closes a sampler, so snapshots live under a bound: the least recently used leave memory and
come back from their checkpoint's folder, or from a file that is written when they leave.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinsmith.engine import adapter_files
from tinsmith.engine.adapter_files import FolderError
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
        if known is not None and known.folder == folder:
            return
        spec, _ = adapter_files.read_spec(folder, model)
        self.entries[name] = Snapshot(model, Layout(model.slots, spec), None, folder)

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
