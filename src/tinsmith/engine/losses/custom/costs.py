"""What an operation will make and do, told from its arguments before it is carried out.

`made` bounds the elements of its result, `work` the multiply-adds or the like. Operations whose result's size
depends on values, not on shapes, are bounded by what they could make at most, or refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Refused(Exception):
    """An operation cannot be carried out; says why."""


class Cost(NamedTuple):
    made: int
    work: int


Args = Sequence[Any]
Kwargs = Mapping[str, Any]
Rule = Callable[[Args, Kwargs], Cost]

FREE = Cost(0, 1)
TENSOR = 256  # elements


def free(args: Args, kwargs: Kwargs) -> Cost:
    """Nothing but numbers, or another view of the same elements."""
    return FREE


def elementwise(args: Args, kwargs: Kwargs) -> Cost:
    """One element for each of the arguments, broadcast together."""
    shapes = {x.shape for x in tensors((args, kwargs))}
    if len(shapes) > 1:
        shapes = {torch.broadcast_shapes(*shapes)}
    n = math.prod(shapes.pop()) if shapes else 1
    return Cost(n, n)


def no_more(args: Args, kwargs: Kwargs) -> Cost:
    """At most as many elements as there are in all arguments together: reductions, sorting, joining."""
    n = sum(x.numel() for x in tensors((args, kwargs)))
    return Cost(n, n)


def positions(args: Args, kwargs: Kwargs) -> Cost:
    """Indices of elements, one number for each dimension."""
    n = sum(x.numel() * max(x.dim(), 1) for x in tensors((args, kwargs)))
    return Cost(n, n)


def where(args: Args, kwargs: Kwargs) -> Cost:
    return elementwise(args, kwargs) if len(args) + len(kwargs) > 1 else positions(args, kwargs)


def shaped(run: Callable[..., Any]) -> Rule:
    """As many as the operation itself says, asked with tensors that have shapes but no elements. A tensor
    costs something even if it has few, since some operations make thousands."""

    def rule(args: Args, kwargs: Kwargs) -> Cost:
        n = sum(x.numel() + TENSOR for x in tensors(run(*hollow(args), **hollow(kwargs))))
        return Cost(n, n)

    return rule


def created(run: Callable[..., Any]) -> Rule:
    """The same for a function that makes a tensor from sizes alone."""

    def rule(args: Args, kwargs: Kwargs) -> Cost:
        n = sum(x.numel() for x in tensors(run(*hollow(args), **{**hollow(kwargs), "device": "meta"})))
        return Cost(n, n)

    return rule


def matrix_product(run: Callable[..., Any]) -> Rule:
    of_shape = shaped(run)

    def rule(args: Args, kwargs: Kwargs) -> Cost:
        made = of_shape(args, kwargs).made
        inner = max((x.shape[-1] if x.dim() else 1 for x in tensors((args, kwargs))), default=1)
        return Cost(made, made * inner)

    return rule


def repeated(run: Callable[..., Any]) -> Rule:
    """repeat_interleave by one number for all; with a tensor of them the size would depend on its values."""
    of_shape = shaped(run)

    def rule(args: Args, kwargs: Kwargs) -> Cost:
        if len(list(tensors((args, kwargs)))) > 1:
            raise Refused("it takes a whole number of repeats here, no tensor of them")
        return of_shape(args, kwargs)

    return rule


def one_hot(args: Args, kwargs: Kwargs) -> Cost:
    classes = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
    if not isinstance(classes, int) or classes < 1:
        raise Refused("num_classes must be given, as a whole number of at least 1")
    n = classes * sum(x.numel() for x in tensors(args))
    return Cost(n, n)


_EQUATION = re.compile(r"[a-zA-Z]+(,[a-zA-Z]+)?(->[a-zA-Z]*)?")


def einsum(args: Args, kwargs: Kwargs) -> Cost:
    """The product of all dimensions, which is what a sum over all pairs would take."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    plain = equation.replace(" ", "") if isinstance(equation, str) else ""
    if not _EQUATION.fullmatch(plain) or kwargs:
        raise Refused("it takes an equation of letters for one or two tensors, such as 'tk,tk->t'")
    sizes: dict[str, int] = {}
    for letters, x in zip(plain.split("->")[0].split(","), operands, strict=True):
        sizes |= dict(zip(letters, x.shape, strict=True))
    n = math.prod(sizes.values())
    return Cost(n, n)


def item(args: Args, kwargs: Kwargs) -> Cost:
    """x[index]. A mask picks at most everything; whole numbers in tensors give their own shape."""
    x, index = args
    if not isinstance(x, Tensor):
        return FREE
    parts = index if isinstance(index, tuple) else (index,)
    chosen = [p for p in parts if isinstance(p, Tensor | list)]
    if not chosen:
        return Cost(x.numel(), 1)
    masks = [p for p in chosen if isinstance(p, Tensor) and p.dtype in (torch.bool, torch.uint8)]
    if masks:
        if len(chosen) > 1:
            raise Refused("a mask can be the only tensor in an index")
        return Cost(x.numel(), x.numel())
    return shaped(lambda value, at: value[at])((x, index), {})


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a value."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def hollow(value: Any) -> Any:
    """The same value with tensors that have no elements."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, list | tuple):
        return type(value)([hollow(each) for each in value])
    if isinstance(value, dict):
        return {key: hollow(each) for key, each in value.items()}
    return value
