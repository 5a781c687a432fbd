"""Running a program on one datum, within its bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tinsmith.engine.losses.custom.costs import Refused
from tinsmith.engine.losses.custom.graph import Node, Program, Ref
from tinsmith.engine.losses.custom.operations import LONGEST_INTEGER
from tinsmith.wire.training import ContentError

# What one datum may make (elements) and do (multiply-adds or the like): so much for each of its logprobs, and
# a beginning for short ones.
MADE = (1 << 18, 1 << 15, 1 << 26)  # beginning, each, most
WORK = (1 << 22, 1 << 20, 1 << 31)


def run(program: Program, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The loss, a scalar, and the metrics. `inputs` by name, logprobs among them. Raises ContentError."""
    values: dict[str, Any] = dict(
        zip(program.places, (inputs[name] for name, _ in program.inputs), strict=True)
    )
    size = inputs["logprobs"].numel()
    made, work = (min(start + each * size, most) for start, each, most in (MADE, WORK))
    for node in program.nodes:
        try:
            value, cost = _step(node, values)
        except Refused as refused:
            raise _at(program, node, str(refused)) from None
        except Exception as error:  # of whatever kind torch has for wrong arguments
            if isinstance(error, MemoryError | torch.OutOfMemoryError):
                raise
            raise _at(program, node, " ".join(str(error).split())[:300]) from None
        made, work = made - cost.made, work - cost.work
        if made < 0 or work < 0:
            what = "makes more elements" if made < 0 else "does more work"
            raise _at(program, node, f"the loss {what} than a datum of {size} logprobs is allowed")
        values[node.name] = value
    return _outcome(program, values)


def _step(node: Node, values: Mapping[str, Any]) -> tuple[Any, Any]:
    args, kwargs = _resolve(node.args, values), _resolve(node.kwargs, values)
    cost = node.operation.cost(args, kwargs)
    if cost.made > MADE[2] or cost.work > WORK[2]:
        return None, cost  # not carried out: the caller refuses it
    value = node.operation.run(*args, **kwargs)
    _check(value)
    return value, cost


def _resolve(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, Ref):
        return values[value.name]
    if isinstance(value, tuple):
        return tuple(_resolve(each, values) for each in value)
    if isinstance(value, list):
        return [_resolve(each, values) for each in value]
    if isinstance(value, dict):
        return {key: _resolve(each, values) for key, each in value.items()}
    if isinstance(value, slice):
        return slice(*(_resolve(each, values) for each in (value.start, value.stop, value.step)))
    return value


def _check(value: Any) -> None:
    """That a value is of a kind that a program may go on with."""
    if isinstance(value, int):
        if value.bit_length() > LONGEST_INTEGER:
            raise Refused("the result is an integer of more than 64 bits")
    elif isinstance(value, tuple | list):
        for each in value:
            _check(each)
    elif isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise Refused(f"a custom loss runs on cpu, not on {value.device}")
    elif not isinstance(value, float | torch.dtype | torch.device | None):
        raise Refused(f"the result is a {type(value).__name__}, with which a custom loss cannot go on")


def _outcome(program: Program, values: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
    loss = values[program.loss]
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        found = f"shape {list(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ContentError(f"custom loss {program.name!r} must return a scalar loss of floats, not {found}")
    metrics: dict[str, float] = {}
    for key, name in program.metrics.items():
        value = values[name]
        if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
            raise ContentError(f"custom loss {program.name!r}: metric {key!r} must be a scalar tensor")
        metrics[key] = float(value.detach())
    return loss, metrics


def _at(program: Program, node: Node, problem: str) -> ContentError:
    return ContentError(f"custom loss {program.name!r}, node {node.name!r} ({node.target}): {problem}")
