"""What a model's routers chose in one run, to be taken again in another.

Where two experts are about equal, rounding decides between them, and the token goes another way from there.
Two runs that are to be compared must therefore take the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class Routing:
    """The experts of every token, by experts layer: index and weights [rows, k] of each."""

    def __init__(self) -> None:
        self._chosen: dict[str, tuple[Tensor, Tensor]] = {}
        self._first: int | None = None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what is chosen inside."""
        with self._active(None):
            yield

    @contextmanager
    def again(self, first: int) -> Iterator[None]:
        """Choose as recorded: the rows inside are those that stood at `first` and after it."""
        with self._active(first):
            yield

    @contextmanager
    def _active(self, first: int | None) -> Iterator[None]:
        self._first = first
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def choose(self, layer: str, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if self._first is None:
            self._chosen[layer] = index, weights
            return index, weights
        before = [x[self._first : self._first + len(index)] for x in self._chosen[layer]]
        # Rows of padding stand behind the others.
        own = [torch.cat([b, x[len(b) :]]) for b, x in zip(before, (index, weights), strict=True)]
        return own[0], own[1]


_current: ContextVar[Routing | None] = ContextVar("tinsmith_routing", default=None)


def route(layer: str, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The experts that an experts layer is to take, where its router chose `index` and `weights`."""
    routing = _current.get()
    return (index, weights) if routing is None else routing.choose(layer, index, weights)
