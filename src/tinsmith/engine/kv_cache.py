"""The paged key-value cache: pages of PAGE tokens, shared by reference, found again by their content.

A page belongs to one adapter's weights and to one exact prefix of tokens. What a cached page holds is
bitwise what computing it again would give, so taking it from the cache changes no result.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import mmap
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tinsmith.engine.kernels import attention as kernel
from tinsmith.engine.kernels import gpu
from tinsmith.engine.model.attention import PAGE, round_up
from tinsmith.engine.model.base import BaseModel

_generations = itertools.count(1)
NULL = 0  # a page of zeros that stands where a shorter sequence of a batch has none


class PagePool:
    """Pages of all layers: keys[layer] is [pages, kv heads, PAGE, key dim], values alike, the model's dtype;
    where the CPU kernel reads them, keys are [pages, kv heads, key dim, PAGE] and a value's dim is padded;
    those of a GPU's have both as [pages, PAGE, kv heads, dim].

    The tensors have the size of `capacity` pages at once: on a GPU because captured graphs know them by their
    addresses, on a CPU as a mapping that takes memory where it is first written to. Where the system does not
    give that, they grow with use, and are copied in front of everybody's next token. Every page has a number
    of references; one that nobody refers to is kept as long as there is room if its content is known.
    """

    def __init__(self, model: BaseModel, cache_bytes: int) -> None:
        self.model = model
        self.on_gpu = gpu.takes(model.device, model.dtype)
        self.by_kernel = not self.on_gpu and kernel.usable(model.device, model.dtype)
        per_token = sum(s.kv_heads * (s.key_dim + s.value_dim) for s in model.attention_layers.values())
        self.page_bytes = max(1, per_token * PAGE * model.dtype.itemsize)
        self.capacity = max(4, cache_bytes // self.page_bytes)
        self.keys: dict[int, Tensor] = {}  # by layer
        self.values: dict[int, Tensor] = {}
        self.places = 0  # pages that the tensors have room for
        self._references: list[int] = []  # of each page that was ever used: those are the first ones
        self._free: list[int] = []
        self._known: dict[bytes, int] = {}  # content -> page
        self._content: dict[int, tuple[bytes, int]] = {}  # page -> (content, serial of the weights)
        self._idle: OrderedDict[int, None] = OrderedDict()  # known pages without references, oldest first
        self.generation = 0  # of the tensors, which are others after growing; no two pools have one in common
        try:
            self._grow(self.capacity + 1, _mapped if model.device.type == "cpu" else torch.zeros)
        except OSError:
            self._grow(min(self.capacity + 1, 64))
        self._references.append(1)  # NULL's

    def _grow(self, pages: int, zeros: Callable[..., Tensor] = torch.zeros) -> None:
        have = self.places
        self.generation = next(_generations)
        for layer, shape in self.model.attention_layers.items():
            heads, keys, values = shape.kv_heads, shape.key_dim, shape.value_dim
            of_keys, of_values = (heads, PAGE, keys), (heads, PAGE, values)
            if self.on_gpu:
                of_keys, of_values = (PAGE, heads, keys), (PAGE, heads, values)
            elif self.by_kernel:
                of_keys = heads, keys, PAGE
                of_values = heads, PAGE, round_up(values, kernel.VALUE_PAD)
            for store, dims in ((self.keys, of_keys), (self.values, of_values)):
                # Zeros: a masked score times what lies in an unused place must be zero, never NaN.
                new = zeros((pages, *dims), dtype=self.model.dtype, device=self.model.device)
                if have:
                    new[:have] = store[layer]
                store[layer] = new
        self.places = pages

    @property
    def used(self) -> int:
        """Pages that somebody refers to."""
        return len(self._references) - 1 - len(self._free) - len(self._idle)

    def allocate(self) -> int | None:
        """A page with one reference, or None when all are in use."""
        if self._free:
            page = self._free.pop()
        elif (page := len(self._references)) <= self.capacity:
            if page == self.places:
                self._grow(min(self.capacity + 1, 2 * page))
            self._references.append(1)
            return page
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        else:
            return None
        self._references[page] = 1
        self._clear(page)
        return page

    def _clear(self, page: int) -> None:
        """Forget the values that a sequence before left in a page. What a query does not see weighs zero, but
        zero times a number that is not finite is not zero. The kernels read no such values."""
        if not (self.on_gpu or self.by_kernel):
            for values in self.values.values():
                values[page] = 0

    def share(self, page: int) -> None:
        if self._references[page] == 0:
            del self._idle[page]
        self._references[page] += 1

    def free(self, page: int) -> None:
        self._references[page] -= 1
        if self._references[page]:
            return
        if page in self._content:
            self._idle[page] = None
        else:
            self._free.append(page)

    def copy(self, source: int, target: int) -> None:
        for store in (*self.keys.values(), *self.values.values()):
            store[target] = store[source]

    def find(self, content: bytes) -> int | None:
        """The page with this content, with one more reference."""
        page = self._known.get(content)
        if page is not None:
            self.share(page)
        return page

    def remember(self, page: int, content: bytes, serial: int) -> None:
        """`page` is full and holds this content from now on."""
        if content not in self._known and page not in self._content:
            self._known[content] = page
            self._content[page] = (content, serial)

    def forget_weights(self, serial: int) -> None:
        """Drop what is known of one adapter's pages."""
        for page in [p for p, (_, s) in self._content.items() if s == serial]:
            self._forget(page)
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)

    def _forget(self, page: int) -> None:
        content, _ = self._content.pop(page)
        del self._known[content]


def _mapped(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take memory where they are first written to. Raises OSError."""
    size = math.prod(shape) * dtype.itemsize
    if not size or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def chain(previous: bytes, tokens: list[int]) -> bytes:
    """The content of a page: its tokens and, through `previous`, all before them."""
    return hashlib.blake2b(previous + np.asarray(tokens, np.int64).tobytes(), digest_size=16).digest()


def root(serial: int, *, long: bool = False) -> bytes:
    """Where the chain of one adapter's pages begins; that of long sequences is another, see rotations.py."""
    return (b"long" if long else b"tinsmith") + serial.to_bytes(8, "little")
