"""Where the matrices of an adapter act: which weights of transformers' model they change, and how.

Tinker's format has a matrix for every projection. A weight of the model may hold several of them: a fused q,
k and v, the gate and up projection of all experts. Then their factors are put side by side:

    W' = W + scale [B1 0; 0 B2] [A1; A2]

which is exact, at the sum of their ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tinsmith.engine import adapter_files
from tinsmith.engine.model.adapted import UNEMBED
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.blueprint import draw
from tinsmith.engine.model.checkpoint import open_checkpoint
from tinsmith.engine.model.loading import Stacked, assign, fingerprint, untie
from tinsmith.engine.model.lora import Layout, LoraLinear, Slot
from tinsmith.engine.model.quantization import full_weights

CPU = torch.device("cpu")
Kind = Literal["linear", "up", "down"]


class ExportError(Exception):
    """An adapter cannot be exported as it was asked for; the message says why, and what would be right."""


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix of the adapter, and the outputs of the weight that are its own."""

    slot: Slot
    outputs: slice


@dataclass(frozen=True, slots=True)
class Target:
    """A weight that an adapter changes: parameter `weight` of the module that transformers calls `module`.

    It is [out, in], or with experts [experts, out, in], or [experts, in, out] if `transposed`.
    """

    module: str
    weight: str
    kind: Kind
    inputs: int
    outputs: int
    parts: tuple[Part, ...]
    experts: int = 0
    transposed: bool = False

    @property
    def parameter(self) -> str:
        return f"{self.module}.{self.weight}"

    @property
    def is_unembedding(self) -> bool:
        return self.parts[0].slot.name == UNEMBED


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of the base's files that is a target, or outputs [first, last) of one expert's."""

    name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None


class Base:
    """A base model as its files have it: the shapes of transformers' model, and where each weight lies.

    `weights` are the files' tensors by their names there; quantized ones under their plain names.
    """

    def __init__(self, name: str, path: str, *, trust_remote_code: bool = False) -> None:
        """Reads configs and headers, no weights. Raises ModelError."""
        plan = draw(path, torch.float32, trust_remote_code=trust_remote_code, whole=True)
        self.folder, self.config, self.quantized = plan.folder, plan.raw, plan.quantized
        self.weights = full_weights(open_checkpoint(plan.folder), plan.raw)
        self._names = {id(weights): name for name, weights in self.weights.items()}
        self._assigned = assign(plan.module, self.weights)
        tied = plan.module.all_tied_weights_keys
        self.tied = bool(tied) and not untie(plan.module, self._assigned.weights)
        self.model = BaseModel.of_shapes(name, path, plan.module, torch.float32)
        self.model.fingerprint = fingerprint(plan.folder)

    @property
    def architecture(self) -> str:
        return type(self.model.module).__name__

    @property
    def embedding(self) -> str:
        """The name in the files of the matrix that embeds."""
        module = self.model.module
        weight = module.get_input_embeddings().weight
        names = [name for name, x in module.state_dict(keep_vars=True).items() if x is weight]
        return next(self._names[id(w)] for n in names if (w := self._assigned.weights.get(n)) is not None)

    def pieces(self, target: Target) -> list[Piece]:
        """The tensors of the files that are this weight. Raises ExportError."""
        weights = self._assigned.weights.get(target.parameter)
        if weights is None:
            raise ExportError(
                f"{self.folder}: its files hold {target.parameter} in a form that cannot be exported yet"
            )
        if not isinstance(weights, Stacked):
            return [Piece(self._names[id(weights)])]
        found: list[Piece] = []
        row = 0
        for part in weights.parts:
            rows = row, row + part[0].shape[0]
            found += [Piece(self._names[id(own)], expert, rows) for expert, own in enumerate(part)]
            row = rows[1]
        return found

    def read(self, target: Target) -> Tensor:
        """A target's own weight, in fp32."""
        made = torch.empty(self._assigned.weights[target.parameter].shape)
        self._assigned.weights[target.parameter].read(made)
        return made


class Adapter:
    """An adapter folder beside the model that it is an adapter of; `targets` are the weights it changes."""

    def __init__(self, folder: Path, base: Base) -> None:
        """Reads it. Raises FolderError."""
        self.base, self.model = base, base.model
        self.spec, _ = adapter_files.read_spec(str(folder), self.model)
        layout = Layout(self.model.slots, self.spec)
        self._views = layout.views(
            adapter_files.read(str(folder), layout, CPU, optimizer=False, gradients=False).params
        )
        self.targets = list(_targets(self.model, self._views.keys()))

    @property
    def rank(self) -> int:
        return self.spec.rank

    @property
    def alpha(self) -> int | float:
        """A whole number where it is one: readers of configs expect that."""
        alpha = self.spec.alpha
        return int(alpha) if float(alpha).is_integer() else alpha

    @property
    def scale(self) -> float:
        return self.spec.alpha / self.spec.rank

    def factors(self, target: Target) -> tuple[Tensor, Tensor]:
        """(A, B) of the whole weight, not scaled: [r, in] and [out, r], or with experts [experts, r, in] and
        [experts, out, r]; r is the rank times the number of parts."""
        if not target.experts:
            return self._side_by_side(target, None)
        pairs = [self._side_by_side(target, expert) for expert in range(target.experts)]
        return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])

    def delta(self, target: Target, expert: int | None) -> Tensor:
        """What the adapter adds to the weight, or to that of one expert: fp32 [out, in], or [in, out] if
        transposed."""
        b, a = self.sides(target, expert)
        product = (b @ a) * self.scale
        return product.T if target.transposed else product

    def sides(self, target: Target, expert: int | None) -> tuple[Tensor, Tensor]:
        """(B [out, r], A [r, in]) of the whole weight, or of one expert's, not scaled."""
        a, b = self._side_by_side(target, expert)
        return b, a

    def part(self, part: Part, expert: int | None) -> tuple[Tensor, Tensor]:
        """(A [r, in], B [out, r]) of one matrix of the adapter, or of one expert's."""
        a, b = self._views[part.slot.name]
        return tuple(x if expert is None or x.dim() == 2 else x[expert] for x in (a, b))  # type: ignore[return-value]

    def _side_by_side(self, target: Target, expert: int | None) -> tuple[Tensor, Tensor]:
        rank = self.rank
        b = torch.zeros(target.outputs, rank * len(target.parts))
        rows: list[Tensor] = []
        for index, part in enumerate(target.parts):
            own_a, own_b = self.part(part, expert)
            rows.append(own_a)
            b[part.outputs, index * rank : (index + 1) * rank] = own_b
        return torch.cat(rows), b


def _targets(model: BaseModel, trained: Any) -> Iterator[Target]:
    for name, child in model.module.named_modules():
        if isinstance(child, LoraLinear):
            parts = [Part(slot, columns) for slot, (_, columns) in zip(child.slots, child.parts, strict=True)]
            found = [Target(name, "weight", "linear", child.in_features, child.out_features, tuple(parts))]
        elif hasattr(child, "tinsmith_name"):
            found = list(_expert_targets(name, child, {slot.name: slot for slot in model.slots}))
        else:
            continue
        for target in found:
            if all(part.slot.name in trained for part in target.parts):
                yield target


def _expert_targets(name: str, module: Any, slots: dict[str, Slot]) -> Iterator[Target]:
    """Those of a module of experts, as its own forward lays them out."""
    public, transposed = str(module.tinsmith_name), bool(module.is_transposed)
    w1, w2 = slots[f"{public}.w1"], slots[f"{public}.w2"]
    inner = w1.out_features
    if module.has_gate:
        w3 = slots[f"{public}.w3"]
        gate, rest = (
            (slice(0, inner), slice(inner, None))
            if module.is_concatenated
            else (slice(0, None, 2), slice(1, None, 2))
        )
        up, width = "gate_up_proj", 2 * inner
        parts: tuple[Part, ...] = (Part(w1, gate), Part(w3, rest))
    else:
        up, width, parts = "up_proj", inner, (Part(w1, slice(None)),)
    yield Target(name, up, "up", w1.in_features, width, parts, w1.experts, transposed)
    yield Target(
        name,
        "down_proj",
        "down",
        w2.in_features,
        w2.out_features,
        (Part(w2, slice(None)),),
        w2.experts,
        transposed,
    )
