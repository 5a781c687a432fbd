"""A custom loss as one of the losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.aside import Aside
from tinsmith.engine.losses.base import Inputs, Loss, listed
from tinsmith.engine.losses.custom.graph import Program, read_program
from tinsmith.engine.losses.custom.program import run
from tinsmith.wire.training import Array, ContentError, Datum

NAME = "custom"


@dataclass(frozen=True, slots=True)
class _CustomLoss(Loss):
    program: Program | None = None

    def settings(self, given: Mapping[str, float | str]) -> dict[str, float]:
        for key in given:
            if key != "loss_id":
                raise ContentError(f"loss_fn_config[{key!r}] is not known to custom; it takes: loss_id")
        return {}

    def check(self, datum: Datum, where: str, vocab: int, aside: Aside) -> tuple[Array, dict[str, Array]]:
        """A datum may bring along what the loss does not read: the same one may go through other losses."""
        assert self.program is not None
        targets = self.check_targets(datum, where, vocab)
        inputs: dict[str, Array] = {}
        keys = {name: "target_tokens" if name == "logprobs" else name for name, _ in self.program.inputs}
        lacking = [key for key in keys.values() if key not in datum.inputs]
        if lacking:
            raise ContentError(
                f"{where} has no loss_fn_inputs[{listed(lacking)}], which loss {self.program.name!r} takes"
            )
        for name, rank in self.program.inputs:
            key = keys[name]
            array = datum.inputs[key]
            if rank == 0 and array.size == 1:
                array = array.reshape(())
            if array.ndim != rank:
                raise ContentError(
                    f"{where} loss_fn_inputs[{key!r}] has rank {array.ndim}, but loss {self.program.name!r} "
                    f"declared {name} with rank {rank}"
                )
            if name != "logprobs":
                inputs[name] = np.array(array)
        return targets, inputs

    def of_datum(
        self, logprobs: Tensor, inputs: Inputs, config: Mapping[str, float]
    ) -> tuple[Tensor, Mapping[str, float]]:
        assert self.program is not None
        loss, metrics = run(self.program, {**inputs, "logprobs": logprobs})
        if logprobs.requires_grad and not loss.requires_grad:
            raise ContentError(
                f"custom loss {self.program.name!r} does not depend on logprobs; it has no gradient"
            )
        return loss, metrics

    def gradient(self, value: Tensor, logprobs: Tensor) -> Tensor:
        assert self.program is not None
        try:
            (found,) = torch.autograd.grad(value, logprobs)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            why = " ".join(str(error).split())[:300]
            raise ContentError(f"custom loss {self.program.name!r} cannot be differentiated: {why}") from None
        return found


def custom_loss(config: Mapping[str, float | str], aside: Aside) -> Loss:
    """The loss that a request names by its loss_id. Raises ContentError."""
    loss_id = config.get("loss_id")
    if not isinstance(loss_id, str):
        raise ContentError("loss_fn_config['loss_id'] is missing; it names a loss of create_custom_loss")
    return _CustomLoss(NAME, whole=_never, many_targets=True, program=read_program(aside.loss(loss_id)))


def _never(
    logprobs: Tensor, inputs: Inputs, config: Mapping[str, float]
) -> tuple[Tensor, Mapping[str, float]]:
    raise AssertionError("of_datum runs the program")
