"""Adapters for other programs: PEFT, vLLM, or merged into a whole model."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tinsmith.engine.adapter_files import CONFIG, WEIGHTS, FolderError, sync
from tinsmith.engine.export import merged, peft, vllm
from tinsmith.engine.export.wiring import Adapter, Base, ExportError
from tinsmith.engine.model.errors import ModelError

FORMATS = ("peft", "vllm", "merged")

__all__ = ["FORMATS", "ExportError", "export"]


def export(
    adapter: Path,
    name: str,
    base: str,
    form: str,
    out: Path,
    *,
    drop: Collection[str] = (),
    keep: Collection[str] = (),
    trust_remote_code: bool = False,
) -> list[str]:
    """Write the new folder `out`, whole or not at all; answers what its reader should know.

    `adapter` is a folder in Tinker's format, `name` the base model's public name, and `base` the folder or
    hub id where its files are. `drop` and `keep` are vllm.convert's. Raises ExportError.
    """
    if form not in FORMATS:
        raise ExportError(f"format: {form!r} is not one of {', '.join(FORMATS)}")
    if (drop or keep) and form != "vllm":
        raise ExportError("drop and keep are for the format vllm: the others take every module")
    if out.exists() or out.is_symlink():
        raise ExportError(f"out: {out} exists already; name a folder that does not")
    try:
        read = Adapter(adapter, Base(name, base, trust_remote_code=trust_remote_code))
        with _new_folder(out) as folder:
            if form == "merged":
                return merged.write(read, folder)
            if form == "peft":
                tensors, config, notes = peft.convert(read)
            else:
                tensors, config, notes = vllm.convert(read, drop=set(drop), keep=set(keep))
            _write_adapter(folder, tensors, config)
            return notes
    except (FolderError, ModelError) as error:
        raise ExportError(str(error)) from error
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ExportError(f"{out} could not be written: {reason}") from error


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place once everything is in it, and on the disk."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.partial")
    part.mkdir()
    try:
        yield part
        for file in part.iterdir():
            sync(file)
        sync(part)
        os.rename(part, out)
        sync(out.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    # Tensors that share memory would be refused: factors of experts may be one and the same.
    save_file({n: x.contiguous().clone() for n, x in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
