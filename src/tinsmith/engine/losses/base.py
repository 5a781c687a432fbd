"""What a loss is: its inputs, its settings, and its value per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from tinsmith.wire.training import Array, ContentError, Datum

Inputs = Mapping[str, Tensor]

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Loss:
    """A token-local loss.

    `value(logprobs, inputs, config)` gives the loss of every target: fp32, in the shape of `logprobs`,
    (n,) or (n, K); it is differentiated by autograd. `inputs` are fp32 in the same shape.
    `required` and `optional` name the float inputs beside target_tokens; `config` the settings with their
    defaults (None: absent). `many_targets`: whether (N, K) targets are allowed.
    """

    name: str
    value: Callable[[Tensor, Inputs, Mapping[str, float]], Tensor]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    config: Mapping[str, float] = field(default_factory=dict)
    many_targets: bool = False

    def settings(self, given: Mapping[str, float | str]) -> dict[str, float]:
        """Defaults overridden by `given`, numbers or numbers as text. Raises ContentError."""
        settings = dict(self.config)
        for key, value in given.items():
            if key not in self.config:
                known = ", ".join(sorted(self.config)) or "none"
                raise ContentError(f"loss_fn_config[{key!r}] is not known to {self.name}; it takes: {known}")
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if not abs(number) <= _LARGEST:
                raise ContentError(f"loss_fn_config[{key!r}] is {value!r}; it must be a finite fp32 number")
            settings[key] = number
        return settings

    def check(self, datum: Datum, where: str, vocab: int) -> tuple[Array, dict[str, Array]]:
        """The targets, int64 (N,) or (N, K), and the float inputs in their shape. Raises ContentError."""
        inputs = dict(datum.inputs)
        targets = inputs.pop("target_tokens", None)
        if targets is None:
            raise ContentError(f"{where}.loss_fn_inputs lacks 'target_tokens', which {self.name} needs")
        length = datum.tokens.size
        if targets.dtype != np.int64:
            raise ContentError(f"{where}.loss_fn_inputs['target_tokens'] must be int64, not {targets.dtype}")
        dims = "(N,) or (N, K)" if self.many_targets else "(N,)"
        if (targets.ndim != 1 and not (self.many_targets and targets.ndim == 2)) or targets.shape[
            0
        ] != length:
            raise ContentError(
                f"{where}.loss_fn_inputs['target_tokens'] has shape {list(targets.shape)}; {self.name} "
                f"takes {dims} with N = {length}, the length of model_input"
            )
        outside = (targets < np.int64(0)) | (targets >= np.int64(vocab))
        if outside.any():
            bad = targets[outside].flat[0]
            raise ContentError(
                f"{where}.loss_fn_inputs['target_tokens'] contains {bad}; the vocabulary has ids 0 to "
                f"{vocab - 1}"
            )
        checked: dict[str, Array] = {}
        for key in (*self.required, *self.optional):
            array = inputs.pop(key, None)
            if array is None:
                if key in self.required:
                    raise ContentError(f"{where}.loss_fn_inputs lacks {key!r}, which {self.name} needs")
                continue
            if array.shape != targets.shape:
                raise ContentError(
                    f"{where}.loss_fn_inputs[{key!r}] has shape {list(array.shape)}; it must have that of "
                    f"target_tokens, {list(targets.shape)}"
                )
            array = array.astype(np.float32)
            if not np.isfinite(array).all():
                raise ContentError(
                    f"{where}.loss_fn_inputs[{key!r}] contains NaN or infinity; all values must be finite"
                )
            checked[key] = array
        if inputs:
            known = ", ".join(("target_tokens", *self.required, *self.optional))
            raise ContentError(
                f"{where}.loss_fn_inputs[{next(iter(inputs))!r}] is not known to {self.name}; "
                f"it takes: {known}"
            )
        return targets, checked
