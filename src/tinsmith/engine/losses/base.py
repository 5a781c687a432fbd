"""What a loss is: its inputs, its settings, and its value per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.aside import Aside
from tinsmith.engine.provenance import check_spans
from tinsmith.wire.training import Array, ContentError, Datum

Inputs = Mapping[str, Tensor]

WEIGHTS = "weights"
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss, token-local (`value`) or of a whole datum (`whole`): one of the two.

    `value(logprobs, inputs, config)` gives the loss of every target: fp32, in the shape of `logprobs`,
    (n,) or (n, K); it is differentiated by autograd. `inputs` are fp32 in the same shape. It may be called
    with any part of a datum's rows, and with those of several datums.
    `whole` is called once per datum, with all its rows, and also gives the datum's metrics, named
    `name:sum` or `name:mean`, the same ones for every datum. Its values may have any shape; they are summed.
    `required` and `optional` name the float inputs beside target_tokens and weights; `config` the settings
    with their defaults (None: absent). `many_targets`: whether (N, K) targets are allowed.
    `output_type` is the name of the answer's kind; `elementwise`: whether it has every target's loss, too.
    `check_inputs(inputs, where)` raises ContentError for what only this loss can know to be wrong.
    """

    name: str
    value: Callable[[Tensor, Inputs, Mapping[str, float]], Tensor] | None = None
    whole: Callable[[Tensor, Inputs, Mapping[str, float]], tuple[Tensor, Mapping[str, float]]] | None = None
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    config: Mapping[str, float] = field(default_factory=dict)
    many_targets: bool = False
    output_type: str = "ArrayRecord"
    elementwise: bool = False
    check_inputs: Callable[[Mapping[str, Array], str], None] | None = None

    def of_tokens(self, logprobs: Tensor, inputs: Inputs, config: Mapping[str, float]) -> Tensor:
        """`value`, times the weights that a datum may bring along to any loss."""
        assert self.value is not None
        return weighted(self.value(logprobs, inputs, config), inputs)

    def of_datum(
        self, logprobs: Tensor, inputs: Inputs, config: Mapping[str, float]
    ) -> tuple[Tensor, Mapping[str, float]]:
        """The same of `whole`."""
        assert self.whole is not None
        value, metrics = self.whole(logprobs, inputs, config)
        return weighted(value, inputs), metrics

    def gradient(self, value: Tensor, logprobs: Tensor) -> Tensor:
        """d loss / d logprobs of what `of_datum` gave. May raise ContentError."""
        (found,) = torch.autograd.grad(value.sum(), logprobs)
        return found

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

    def check_targets(self, datum: Datum, where: str, vocab: int) -> Array:
        """The targets, int64 (N,) or (N, K). Raises ContentError, also for spans that do not cover them, and
        for inputs that are missing, all of them at once."""
        lacking = [name for name in ("target_tokens", *self.required) if name not in datum.inputs]
        if lacking:
            raise ContentError(f"{where}.loss_fn_inputs lacks {listed(lacking)}, which {self.name} needs")
        targets = datum.inputs["target_tokens"]
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
        check_spans(datum, where, len(targets))
        return targets

    def check(self, datum: Datum, where: str, vocab: int, aside: Aside) -> tuple[Array, dict[str, Array]]:
        """The targets, and the float inputs in their shape. Raises ContentError."""
        targets = self.check_targets(datum, where, vocab)
        inputs = {name: array for name, array in datum.inputs.items() if name != "target_tokens"}
        checked: dict[str, Array] = {}
        for key in (*self.required, *self.optional, WEIGHTS):
            array = inputs.pop(key, None)
            if array is None:
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
            known = ", ".join(("target_tokens", *self.required, *self.optional, WEIGHTS))
            raise ContentError(
                f"{where}.loss_fn_inputs[{listed(sorted(inputs))}] is not known to {self.name};"
                f" it takes: {known}"
            )
        if self.check_inputs is not None:
            self.check_inputs(checked, where)
        return targets, checked


def listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name[:80]) for name in names)


def weighted(value: Tensor, inputs: Inputs) -> Tensor:
    weights = inputs.get(WEIGHTS)
    return value if weights is None else value * weights
