"""A base model with an adapter merged into it: a whole model folder, written tensor by tensor.

Every tensor of the base's files is written anew under its own name and in its own dtype, in files that hold
what the base's hold; W + scale B A is computed in fp32 and rounded once. Quantized weights become bf16 ones.
A tied unembedding that was trained becomes a tensor of its own.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tinsmith.engine.export.wiring import Adapter, Base, Piece, Target
from tinsmith.engine.model.checkpoint import INDEX, PIECE, SINGLE, Stored, Weights

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor to write: the base's own, and where the adapter changes it."""

    name: str
    weights: Weights
    changed: tuple[Target, Piece] | None

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype if isinstance(self.weights, Stored) else torch.bfloat16

    @property
    def nbytes(self) -> int:
        return math.prod(self.weights.shape) * self.dtype.itemsize


def write(adapter: Adapter, folder: Path) -> list[str]:
    """Write the model into the empty `folder`; answers remarks. Raises ExportError, ModelError, OSError."""
    base = adapter.base
    changed = {
        piece.name: (target, piece)
        for target in adapter.targets
        if not (target.is_unembedding and base.tied)
        for piece in base.pieces(target)
    }
    files: dict[str, list[_Tensor]] = {}
    for name, weights in sorted(base.weights.items(), key=lambda item: item[1].place):
        file = Path(weights.place[0]).name
        files.setdefault(file, []).append(_Tensor(name, weights, changed.get(name)))
    untied = next((t for t in adapter.targets if t.is_unembedding and base.tied), None)
    if untied is not None:
        head = _Tensor(_head_name(base), base.weights[base.embedding], (untied, Piece("")))
        files["unembedding.safetensors"] = [head]
    names = _file_names(list(files))
    for file, tensors in files.items():
        with open(folder / names[file], "wb") as stream:
            _write_file(stream, tensors, adapter)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for tensors in files.values() for t in tensors)},
            "weight_map": {t.name: names[file] for file, tensors in files.items() for t in tensors},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    _copy_the_rest(base, folder)
    config = json.loads((base.folder / "config.json").read_text())
    config = _changed_config(config, untied=untied is not None, full=bool(base.quantized))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return _remarks(base, untied)


def _write_file(stream: BinaryIO, tensors: list[_Tensor], adapter: Adapter) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.weights.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        for piece in _values(tensor, adapter):
            stream.write(memoryview(piece.contiguous().view(-1).view(torch.uint8).numpy().data))


def _values(tensor: _Tensor, adapter: Adapter) -> Iterator[Tensor]:
    """A tensor's values in order, a piece at a time."""
    weights, shape = tensor.weights, tensor.weights.shape
    if tensor.changed is None and isinstance(weights, Stored):
        for _, values in weights.pieces(PIECE):
            yield values
        return
    if tensor.changed is None:
        made = torch.empty(shape, dtype=tensor.dtype)
        weights.read(made)
        yield made
        return
    target, piece = tensor.changed
    if target.experts and piece.expert is None:  # all experts are one tensor: one after the other
        for expert, own in enumerate(_experts(weights, tensor.dtype)):
            yield (own.float() + adapter.delta(target, expert)).to(tensor.dtype)
        return
    left, right = adapter.sides(target, piece.expert)
    left = left if piece.rows is None else left[slice(*piece.rows)]
    for first, rows in _rows(weights, tensor.dtype):
        merged = rows.float().addmm_(left[first : first + len(rows)], right, alpha=adapter.scale)
        yield merged.to(tensor.dtype)


def _rows(weights: Weights, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Some rows of a matrix at a time: (the first one, them)."""
    columns = weights.shape[1]
    if isinstance(weights, Stored):
        for at, flat in weights.pieces(max(1, PIECE // columns) * columns):
            yield at // columns, flat.view(-1, columns)
        return
    made = torch.empty(weights.shape, dtype=dtype)
    weights.read(made)
    for first in range(0, len(made), max(1, PIECE // columns)):
        yield first, made[first : first + max(1, PIECE // columns)]


def _experts(weights: Weights, dtype: torch.dtype) -> Iterator[Tensor]:
    if isinstance(weights, Stored):
        for _, flat in weights.pieces(math.prod(weights.shape[1:])):
            yield flat.view(weights.shape[1:])
        return
    made = torch.empty(weights.shape, dtype=dtype)
    weights.read(made)
    yield from made


def _file_names(files: list[str]) -> dict[str, str]:
    """A single file has the name that readers look for first, so of several none may have it."""
    if len(files) == 1:
        return {files[0]: SINGLE}
    if SINGLE not in files:
        return {file: file for file in files}
    return {file: f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, file in enumerate(files, 1)}


def _head_name(base: Base) -> str:
    """What transformers calls the unembedding of a model that does not tie it."""
    module = base.model.module
    head = module.get_output_embeddings()
    return next(f"{name}.weight" for name, child in module.named_modules() if child is head)


def _changed_config(config: dict[str, Any], *, untied: bool, full: bool) -> dict[str, Any]:
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            if untied:
                part["tie_word_embeddings"] = False
            if full:
                part.pop("quantization_config", None)
                for name in ("dtype", "torch_dtype"):
                    if name in part:
                        part[name] = "bfloat16"
    return config


def _copy_the_rest(base: Base, folder: Path) -> None:
    """Tokenizer, generation config, chat template, code: all that are no weights. The base's own card is not
    this model's."""
    for file in sorted(base.folder.iterdir()):
        name = file.name.lower()
        weights = file.suffix.lower() in _WEIGHTS or name.endswith(".index.json")
        if file.is_file() and not weights and not name.startswith((".", "readme")) and name != "config.json":
            shutil.copyfile(file, folder / file.name)


def _remarks(base: Base, untied: Target | None) -> list[str]:
    found: list[str] = []
    if untied is not None:
        found.append("the unembedding was tied to the embedding and is now a tensor of its own")
    if base.quantized:
        found.append(f"the base's weights are stored as {base.quantized}; these are bf16")
    return found
