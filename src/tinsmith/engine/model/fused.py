"""Norms, gates and rotary embeddings of transformers' modules, done by a kernel in one pass each.

No family is known here: a module is taken over if the kernel gives what the module's own code gives, which is
tried on random numbers, once for every class, when a model is loaded. Everything else stays as it is.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tinsmith.engine.kernels import elementwise as kernel
from tinsmith.engine.kernels import gpu
from tinsmith.engine.kernels.elementwise import NormStyle
from tinsmith.engine.model.packing import current_pass

_ROWS = 16
_ROTATIONS = "apply_rotary_pos_emb"  # what modeling files call the function that their attention uses


def fuse(root: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Take over what can be below `root`, the language model, whose tensors are of `dtype`."""
    if not kernel.usable(device, dtype):
        return
    styles: dict[type, NormStyle | None] = {}
    gates: dict[tuple[type, ...], str] = {}
    files = set()
    for name, child in list(root.named_modules()):
        # In fp32 norms stay transformers' own, to whose last digits recurrent layers are sensitive; but on a
        # GPU torch sums a row in another order for other numbers of rows.
        if (dtype is torch.bfloat16 or gpu.takes(device)) and _is_norm(child, dtype):
            if type(child) not in styles:
                styles[type(child)] = _style(child, dtype)
            style = styles[type(child)]
            if style is not None:
                parent, _, leaf = name.rpartition(".")
                setattr(root.get_submodule(parent), leaf, FusedNorm(child, style))
        elif hasattr(child, "down_proj") and hasattr(child, "act_fn"):
            key = type(child), type(child.act_fn)
            if key not in gates:
                gates[key] = _gate_of(child, dtype)
            if gates[key] == "experts":
                child._apply_gate = _halves
            elif gates[key]:
                child.forward = partial(_MLPS[gates[key]], child)
        if hasattr(child, "tinsmith_attends"):
            files.add(sys.modules[type(child).__module__])
    for file in files:
        _take_rotation(file, device, dtype)


# Norms


class FusedNorm(nn.Module):
    """An RMS norm: [..., n] -> [..., n] dense."""

    def __init__(self, base: nn.Module, style: NormStyle) -> None:
        super().__init__()
        self.weight = base.weight
        self.variance_epsilon = _epsilon(base)
        self.style = style
        self._plain = base.forward

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not self.weight.dtype:  # some keep what runs past their layers in fp32 (Mamba-2)
            plain: Tensor = self._plain(x)
            return plain
        return kernel.norm(x, self.weight, self.variance_epsilon, self.style)


def _epsilon(module: nn.Module) -> float:
    for name in ("variance_epsilon", "eps"):
        if isinstance(value := getattr(module, name, None), float):
            return value
    return 0.0


def _is_norm(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether it could be one: a vector for its only parameter, and one argument."""
    parameters = list(module.named_parameters())
    return (
        len(parameters) == 1
        and parameters[0][0] == "weight"
        and parameters[0][1].dim() == 1
        and parameters[0][1].dtype is dtype
        and not any(True for _ in module.children())
        and _epsilon(module) > 0
        and len(inspect.signature(module.forward).parameters) == 1
    )


@torch.no_grad()
def _style(module: nn.Module, dtype: torch.dtype) -> NormStyle | None:
    """The style in which the kernel does as the module, or None."""
    module = copy.deepcopy(module)
    weight: Tensor = module.weight  # type: ignore[assignment]
    weight.copy_(_random(*weight.shape))
    x = (3 * _random(_ROWS, *weight.shape)).to(weight.device, dtype)
    try:
        wanted = module(x)
    except Exception:
        return None
    tries = {style: kernel.norm(x, weight, _epsilon(module), style) for style in NormStyle}
    # Two styles may differ in rounding alone: the one that rounds most numbers as the module does.
    best = min(tries, key=lambda style: (_apart(tries[style], wanted), int((tries[style] != wanted).sum())))
    return best if _same(tries[best], wanted) else None


# Gates


def _mlp(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.down_proj(kernel.gate(self.gate_proj(x), self.up_proj(x)))
    return y


def _mlp_of_one(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.down_proj(_halves(self.gate_up_proj(x)))
    return y


def _halves(x: Tensor) -> Tensor:
    return kernel.gate(*x.chunk(2, dim=-1))


_MLPS: dict[str, Callable[[Any, Tensor], Tensor]] = {"apart": _mlp, "one": _mlp_of_one}


@torch.no_grad()
def _gate_of(module: Any, dtype: torch.dtype) -> str:
    """The way in which the kernel does as the module: "experts", a key of _MLPS, or nothing."""
    apart = isinstance(getattr(module, "gate_proj", None), nn.Module) and hasattr(module, "up_proj")
    one = isinstance(getattr(module, "gate_up_proj", None), nn.Module)
    device = next(module.parameters()).device
    try:
        if hasattr(module, "_apply_gate"):
            x = (3 * _random(_ROWS, 64)).to(device, dtype)
            return "experts" if _same(_halves(x), module._apply_gate(x)) else ""
        if not (apart or one):
            return ""
        width = (module.gate_proj if apart else module.gate_up_proj).in_features
        x = _random(1, _ROWS, width).to(device, dtype)
        way = "apart" if apart else "one"
        return way if _same(_MLPS[way](module, x), module(x)) else ""
    except Exception:
        return ""


# Rotations


def _take_rotation(file: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Put the kernel in the place of a modeling file's own function, inside this server's passes alone."""
    original = getattr(file, _ROTATIONS, None)
    if original is None or isinstance(original, _Rotation):
        return
    if list(inspect.signature(original).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return
    taken = _Rotation(original, device, dtype)
    if taken.whole or taken.partial or taken.shared:
        setattr(file, _ROTATIONS, taken)


class _Rotation:
    """A modeling file's function, by the kernel where that is known to do the same.

    whole: cos and sin are as wide as a head; partial: they are narrower, and the rest of a head stays;
    shared: they are half as wide, and both halves of a head take the same.
    """

    def __init__(
        self, original: Callable[..., tuple[Tensor, Tensor]], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.original, self.device, self.dtype = original, device, dtype
        self.whole = self._tried(32, 32, 32)
        self.partial = self._tried(48, 32, 32)
        self.shared = not self.partial and self._tried(32, 16, 32)

    @torch.no_grad()
    def _tried(self, dim: int, width: int, rotary: int) -> bool:
        q, k = (_random(heads, _ROWS, dim).unsqueeze(0).to(self.device, self.dtype) for heads in (3, 2))
        cos, sin = (_random(1, _ROWS, width).to(self.device, self.dtype) for _ in range(2))
        try:
            wanted = self.original(q, k, cos, sin)
        except Exception:
            return False
        return all(_same(kernel.rotate(x, cos, sin, rotary), w) for x, w in zip((q, k), wanted, strict=True))

    def _rotary(self, dim: int, width: int) -> int:
        """How much of a head the kernel turns; 0 where it cannot."""
        if width == dim:
            return dim if self.whole else 0
        if self.shared:
            return dim if 2 * width == dim else 0
        return width if self.partial and width < dim else 0

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if args or kwargs or current_pass() is None or not self._fits(q, k, cos, sin):
            return self.original(q, k, cos, sin, *args, **kwargs)
        q_rotary, k_rotary = (self._rotary(x.shape[-1], cos.shape[-1]) for x in (q, k))
        if not (q_rotary and k_rotary):
            return self.original(q, k, cos, sin)
        return kernel.rotate(q, cos, sin, q_rotary), kernel.rotate(k, cos, sin, k_rotary)

    @staticmethod
    def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
        """One batch of packed rows, everything in one dtype that the kernel knows."""
        return (
            q.dim() == k.dim() == 4
            and q.shape[0] == k.shape[0] == 1
            and cos.shape[:-1] == q.shape[:1] + q.shape[2:3]
            and q.dtype is k.dtype is cos.dtype is sin.dtype
            and kernel.usable(q.device, q.dtype)
        )


# Trying


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def _apart(ours: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over the norm."""
    return float((ours.double() - wanted.double()).norm() / wanted.double().norm())


def _same(ours: Tensor, wanted: Tensor) -> bool:
    """Equal but for rounding."""
    near = 2e-6 if ours.dtype is torch.float32 else 6e-3
    return ours.shape == wanted.shape and ours.dtype is wanted.dtype and _apart(ours, wanted) < near
