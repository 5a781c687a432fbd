"""What every part of an operator's work has: the data folder's store, and who acts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tinsmith.store import Connection, Store

from .audit import Actor

T = TypeVar("T")


class Acts:
    """Acts of one operator. Each is one transaction, with its entry in the audit log."""

    def __init__(self, store: Store, actor: Actor) -> None:
        self._store = store
        self._actor = actor

    def _do(self, work: Callable[[Connection], T]) -> T:
        return self._store.write_now(work)
