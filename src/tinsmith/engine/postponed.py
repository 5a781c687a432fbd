"""torch's compiler, loaded when something is compiled and not before.

transformers marks a few functions for torch.compile while it is imported (`torch._dynamo.disable` and its
like), and for that all of torch._dynamo, Inductor and Triton is imported: a quarter of an engine's start.
Nothing here is compiled by torch, and for what is not compiled such a mark changes nothing. So the package
stands there empty at first, with marks that mark nothing; who asks it for anything else gets the real one.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_PACKAGE = "torch._dynamo"
_ALONE = f"{_PACKAGE}._trace_wrapped_higher_order_op"  # needs nothing of the package; masks are made with it


def postpone_compiler() -> None:
    """From now on `import torch._dynamo` imports nothing. Before transformers is imported; once is enough."""
    if _PACKAGE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _mark(function: Any = None, *_: object, **__: object) -> Any:
    """What a decorator that has nothing to say returns, with or without arguments of its own."""
    return function if function is not None else lambda decorated: decorated


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the package, and loads it in two steps."""

    def __init__(self) -> None:
        self.real: importlib.abc.Loader | None = None
        self.module: ModuleType | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == _PACKAGE and self.module is None:
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
            if spec is not None:
                self.real, spec.loader = spec.loader, self
            return spec
        if name.startswith(f"{_PACKAGE}.") and name != _ALONE:
            self.load()
            if name in sys.modules:  # the package has imported it by itself
                return importlib.machinery.ModuleSpec(name, _Loaded(sys.modules[name]))
        return None

    def exec_module(self, module: ModuleType) -> None:
        self.module = module
        marks: dict[str, Callable[..., Any]] = dict.fromkeys(
            ("disable", "assume_constant_result", "allow_in_graph"), _mark
        )
        module.__dict__.update(marks, __getattr__=self.get)

    def get(self, name: str) -> Any:
        """An attribute of the package that is not there yet."""
        if name.startswith("__"):  # asked by inspection of all modules, and of no use to a compiler
            raise AttributeError(name)
        self.load()
        return getattr(self.module, name)

    def load(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            assert self.module is not None
            assert self.real is not None
            assert self.module.__spec__ is not None
            self.module.__spec__.loader = self.real
            del self.module.__dict__["__getattr__"]
            self.real.exec_module(self.module)


class _Loaded(importlib.abc.Loader):
    """Loads what is there."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        pass
