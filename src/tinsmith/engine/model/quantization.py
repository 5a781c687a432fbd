"""Quantized checkpoints: which formats are known, and their weights in the dtype that is computed in.

Adapters are trained on weights in full, so quantized weights become full ones while they are read. How a
tensor is packed is seen from its own name, dtype and shape and those of its scales beside it; the config
decides whether the format is one of those that are understood here. transformers' own quantizers are not
used for it: they want packages of their own (accelerate, compressed-tensors), need all of a layer in memory
twice, and refuse DeepSeek-V3's sizes that are no multiple of a block.

Sources of the formulas: FP8, DeepSeek-V3's report, 3.3.2, and its inference/fp8_cast_bf16.py; MXFP4, the OCP
Microscaling Formats specification 1.0 (E2M1 values, E8M0 scales for 32 of them) in GPT-OSS's layout; INT4 and
INT8, compressed-tensors' "pack-quantized" (offset binary, the first value in the lowest bits).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinsmith.engine.model.checkpoint import Stored, Weights, piece_size
from tinsmith.engine.model.errors import ModelError

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("_scale_inv", "_scale")
# Tensors that a quantized weight brings along and that mean nothing once it is a full one.
_ALONG = ("input_scale", "activation_scale", "_scale_inv", "_scale", "_shape")
_COMPRESSED = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")
_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says about the quantization of its weights; empty if nothing."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            for key in ("quantization_config", "compression_config"):
                if isinstance(part.get(key), Mapping):
                    return dict(part[key])
    return {}


def recognise(config: Mapping[str, Any]) -> str:
    """The format of a model's weights in words, from its config.json; empty for full weights.

    Raises ModelError for what cannot be undone here.
    """
    settings = settings_of(config)
    if not settings:
        return ""
    method = str(settings.get("quant_method", "")).lower()
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        method = "bitsandbytes"
    if method == "fp8":
        block = _block(settings)
        return f"FP8 with a scale for {block[0]} x {block[1]} weights" if block else "FP8"
    if method == "fbgemm_fp8":
        return "FP8 with a scale for a row"
    if method == "mxfp4":
        return "MXFP4"
    if method == "modelopt" and str(settings.get("quant_algo", "")).upper() == "FP8":
        return "FP8"
    if method == "compressed-tensors":
        return _compressed(settings)
    named = f"{method} ({settings['quant_algo']})" if settings.get("quant_algo") else method or "no name"
    raise ModelError(
        f"its weights are quantized as {named}, for which this server has no dequantizer; it has those for "
        "FP8, MXFP4 and compressed-tensors' INT4, INT8 and FP8. Serve the full weights, or one of those"
    )


def _block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    said = [settings.get("weight_block_size"), *(g.get("block_structure") for g in _groups(settings))]
    for block in said:
        match block:
            case [int(rows), int(columns)] if rows > 0 and columns > 0:
                return rows, columns
    return None


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What compressed-tensors' groups of layers say of their weights, each with the group's own format."""
    groups = settings.get("config_groups")
    found = groups.values() if isinstance(groups, Mapping) else []
    return [
        {"format": group.get("format"), **group["weights"]}
        for group in found
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)
    ]


def _compressed(settings: Mapping[str, Any]) -> str:
    """compressed-tensors' formats, one for all layers or one a group of layers."""
    groups = _groups(settings)
    formats = {str(settings.get("format", "dense")), *(str(g["format"]) for g in groups if g.get("format"))}
    formats.discard("mixed-precision")  # then the groups say it
    sparsity = settings.get("sparsity_config") or {}
    refused = sorted(formats - set(_COMPRESSED))
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        refused.append(str(sparsity["format"]))
    if refused:
        raise ModelError(
            f"its weights are stored by compressed-tensors as {refused[0]}, for which this server has no "
            f"dequantizer; it has those for {', '.join(_COMPRESSED[:-1])}"
        )
    kinds = []
    for weights in groups:
        bits, kind = weights.get("num_bits"), str(weights.get("type", "int"))
        if weights.get("symmetric") is False or weights.get("actorder") in ("group", True):
            raise ModelError(
                "its weights are quantized by compressed-tensors with zero points or in their own order "
                "(asymmetric, actorder), for which this server has no dequantizer"
            )
        if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
            raise ModelError(
                f"its weights are quantized by compressed-tensors to {bits} bits ({kind}), for which this "
                "server has no dequantizer; it has those for INT4, INT8 and FP8"
            )
        name = f"{'FP' if kind == 'float' else 'INT'}{bits}"
        size = weights.get("group_size")
        kinds.append(f"{name} in groups of {size}" if isinstance(size, int) and size > 0 else name)
    return " and ".join(dict.fromkeys(kinds)) + " (compressed-tensors)" if kinds else "compressed-tensors"


def full_weights(tensors: Mapping[str, Stored], config: Mapping[str, Any]) -> dict[str, Weights]:
    """The tensors of a checkpoint as a full one would have them: quantized weights under their plain names,
    without scales and the like. Raises ModelError, naming the tensor."""
    block = _block(settings_of(config))
    found: dict[str, Weights] = {}
    for name, stored in tensors.items():
        scale = next((tensors[name + end] for end in _SCALES if name + end in tensors), None)
        if name.endswith("_blocks") and stored.dtype == torch.uint8:
            found[name[:-7]] = _mxfp4(stored, tensors.get(f"{name[:-7]}_scales"))
        elif name.endswith(".weight_packed"):
            found[name.removesuffix("_packed")] = _packed(name.removesuffix("_packed"), tensors)
        elif stored.dtype in (*_FP8, torch.int8) and scale is not None:
            found[name] = Scaled(stored, scale, block)
        elif stored.dtype in _FP8 and not _is_along(name, tensors):
            raise ModelError(f"{stored.file}: {name} is quantized to FP8, and there is no {name}_scale_inv")
        elif not _is_along(name, tensors):
            found[name] = stored
    return found


def _is_along(name: str, tensors: Mapping[str, Stored]) -> bool:
    if name.endswith("_scales") and f"{name[:-7]}_blocks" in tensors:
        return True
    base = next((name.removesuffix(end) for end in _ALONG if name.endswith(end)), None)
    if base is None:
        return False
    if base.endswith("."):  # input_scale
        base += "weight"
    weight = tensors.get(base)
    return f"{base}_packed" in tensors or (weight is not None and weight.dtype in (*_FP8, torch.int8))


def _mxfp4(blocks: Stored, scales: Stored | None) -> Mxfp4:
    if scales is None:
        raise ModelError(f"{blocks.file}: {blocks.name} has no {blocks.name[:-7]}_scales beside it")
    if (
        scales.dtype not in (torch.uint8, torch.float8_e8m0fnu)
        or len(blocks.shape) != 4
        or blocks.shape[:-1] != scales.shape
    ):
        raise ModelError(
            f"{blocks.file}: {blocks.name} {_kind(blocks)} and {scales.name} {_kind(scales)} are no MXFP4: "
            "bytes [experts, out, groups, half of a group] and one scale a group"
        )
    return Mxfp4(blocks, scales)


def _kind(stored: Stored) -> str:
    return f"{str(stored.dtype).removeprefix('torch.')} {list(stored.shape)}"


def _packed(name: str, tensors: Mapping[str, Stored]) -> Weights:
    packed = tensors[f"{name}_packed"]
    for end in ("_zero_point", "_g_idx"):
        if name + end in tensors:
            raise ModelError(f"{packed.file}: {name + end} is there, for which there is no dequantizer here")
    scale, shape = tensors.get(f"{name}_scale"), tensors.get(f"{name}_shape")
    if scale is None or shape is None:
        end = "_scale" if scale is None else "_shape"
        raise ModelError(f"{packed.file}: {name}_packed has no {name + end} beside it")
    if shape.shape != (2,) or shape.dtype not in (torch.int32, torch.int64):
        raise ModelError(f"{shape.file}: {shape.name} is {_kind(shape)}, where two numbers are expected")
    rows, columns = (int(n) for n in shape.whole().tolist())
    each = next((n for n in (8, 4) if packed.shape[-1:] == (math.ceil(columns / n),)), None)
    if packed.dtype != torch.int32 or packed.shape[:-1] != (rows,) or each is None:
        raise ModelError(
            f"{packed.file}: {packed.name} is {list(packed.shape)}, which are no {rows} x {columns} weights "
            "of 4 or 8 bits"
        )
    return Packed(packed, scale, (rows, columns), 32 // each)


def _lookup(values: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from bytes to fp32: of `values` [256], or for a byte two of [256, 2]. On a CPU twenty times
    as fast as torch's own conversion from FP8."""
    pairs = values.dim() == 2
    numbers = values.float().contiguous()
    if pairs:  # as one number of twice the width
        numbers = numbers.view(torch.int64).view(-1)

    def look_up(raw: Tensor) -> Tensor:
        """uint8 [..., n] -> [..., n], or [..., 2 n] of pairs."""
        table = numbers.to(raw.device)
        return table.index_select(0, raw.reshape(-1).int()).view(torch.float32).view(*raw.shape[:-1], -1)

    return look_up


_BYTES = torch.arange(256, dtype=torch.uint8)
_NIBBLES = torch.stack([_BYTES & 15, _BYTES >> 4], dim=1)
_LOOKUPS: dict[torch.dtype | str | int, Callable[[Tensor], Tensor]] = {
    **{dtype: _lookup(_BYTES.view(dtype)) for dtype in (*_FP8, torch.int8)},
    torch.float8_e8m0fnu: _lookup(_BYTES.view(torch.float8_e8m0fnu)),
    "e2m1": _lookup(torch.tensor([*_E2M1, *(-x for x in _E2M1)])[_NIBBLES.long()]),
    4: _lookup(_NIBBLES.float() - 8),
    8: _lookup(_BYTES.float() - 128),
}


class _Grid:
    """The scales of matrices [..., rows, columns]: one number, one a row, or one a block."""

    def __init__(self, stored: Stored, weight: Stored, shape: tuple[int, ...], block: tuple[int, int] | None):
        """`block` is what the config says of its size. Raises ModelError if the scales do not suit it."""
        *outer, rows, columns = shape
        scale = stored.whole()
        # An exponent, E8M0, may be stored as a plain byte.
        count = math.prod(outer)
        unsuitable = ModelError(
            f"{stored.file}: {stored.name}, {_kind(stored)}, does not suit {weight.name} {list(shape)}"
        )
        if scale.dtype == torch.uint8:
            scale = _LOOKUPS[torch.float8_e8m0fnu](scale)
        elif not scale.is_floating_point():
            raise unsuitable
        scale = scale.float()
        if scale.numel() == 1:
            scale = scale.view(1, 1, 1)
        elif outer and scale.dim() < 3:  # one a matrix, or one a row of each
            if len(scale) != count:
                raise unsuitable
            scale = scale.view(count, -1, 1)
        elif scale.dim() < 2:
            scale = scale.view(1, -1, 1)
        elif scale.dim() == 2:
            scale = scale.unsqueeze(0)
        scale = scale.flatten(0, -3)
        self.scale = scale.expand(count, -1, -1) if len(scale) == 1 else scale
        self.columns = columns
        sizes = []
        if self.scale.shape[0] != count:
            raise unsuitable
        for have, total, said in zip(self.scale.shape[1:], (rows, columns), block or (0, 0), strict=True):
            if said and math.ceil(total / said) == have:
                sizes.append(said)
            elif have and total % have == 0:
                sizes.append(total // have)
            else:
                raise unsuitable
        self.rows, self.block = sizes

    def apply(self, matrix: int, first: int, values: Tensor) -> None:
        """Scale rows [first, first + n) of a matrix, fp32 [n, columns], in place."""
        lines = torch.arange(first, first + len(values)) // self.rows
        scale = self.scale[matrix].index_select(0, lines).to(values.device)
        if self.columns % self.block == 0:
            values.view(len(values), -1, self.block).mul_(scale.unsqueeze(-1))
        else:
            values.mul_(scale.repeat_interleave(self.block, 1)[:, : self.columns])


def _rows(stored: Stored, count: int, width: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """A tensor of `count` rows, some of them at a time: (first row, uint8 [n, bytes of a row])."""
    each = math.prod(stored.shape) // max(1, count)
    size = max(1, piece_size(device) // max(1, width)) * each
    for at, piece in stored.pieces(max(1, size)):
        yield at // max(1, each), piece.view(torch.uint8).view(-1, each * stored.dtype.itemsize).to(device)


@dataclass(frozen=True, slots=True)
class Scaled:
    """FP8 or INT8 weights, a byte each, times their scales: one, one a row, or one a block."""

    weight: Stored
    scale: Stored
    block: tuple[int, int] | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def place(self) -> tuple[str, int]:
        return self.weight.place

    def read(self, into: Tensor) -> None:
        _read_scaled(self.weight, self.scale, self.shape, self.block, _LOOKUPS[self.weight.dtype], into)


@dataclass(frozen=True, slots=True)
class Packed:
    """Integers of `bits` bits in the words of int32 [rows, columns / (32 / bits)], times their scales."""

    weight: Stored
    scale: Stored
    shape: tuple[int, ...]
    bits: int

    @property
    def place(self) -> tuple[str, int]:
        return self.weight.place

    def read(self, into: Tensor) -> None:
        _read_scaled(self.weight, self.scale, self.shape, None, _LOOKUPS[self.bits], into)


def _read_scaled(
    weight: Stored,
    scale: Stored,
    shape: tuple[int, ...],
    block: tuple[int, int] | None,
    look_up: Callable[[Tensor], Tensor],
    into: Tensor,
) -> None:
    matrix_shape = shape if len(shape) > 1 else (1, *shape)
    rows, columns = matrix_shape[-2:]
    grid = _Grid(scale, weight, matrix_shape, block)
    flat = into.view(-1, columns)
    for first, raw in _rows(weight, len(flat), columns, into.device):
        values = look_up(raw)[:, :columns].contiguous()
        at = 0
        while at < len(values):  # a piece may reach over several matrices
            matrix, row = divmod(first + at, rows)
            stop = min(len(values), at + rows - row)
            grid.apply(matrix, row, values[at:stop])
            at = stop
        flat[first : first + len(values)] = values


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """GPT-OSS's experts: blocks, uint8 [experts, out, groups, 16], two values a byte, the first in the lower
    half, and scales, uint8 [experts, out, groups]; the full weights are [experts, in, out]."""

    blocks: Stored
    scales: Stored

    @property
    def shape(self) -> tuple[int, ...]:
        experts, out, groups, each = self.blocks.shape
        return experts, groups * each * 2, out

    @property
    def place(self) -> tuple[str, int]:
        return self.blocks.place

    def read(self, into: Tensor) -> None:
        experts, width, out = self.shape
        for first, raw in _rows(self.blocks, experts * out, width, into.device):
            groups = self.blocks.shape[2]
            stop = first + len(raw)
            count = (stop - first) * groups
            ((_, exponents),) = self.scales.pieces(count, first * groups, stop * groups)
            values = _LOOKUPS["e2m1"](raw.view(len(raw), groups, -1))
            scale = _LOOKUPS[torch.float8_e8m0fnu](exponents.to(into.device))
            values.mul_(scale.view(len(raw), groups, 1))
            values = values.view(len(raw), width)
            at = 0
            while at < len(values):
                expert, row = divmod(first + at, out)
                end = min(len(values), at + out - row)
                into[expert, :, row : row + end - at] = values[at:end].T
                at = end
