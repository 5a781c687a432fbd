"""One folder per tiny model, made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.engine.tiny import make_model
from tinsmith.engine.model.attention import PADDING

# Tiny models gain nothing from threads, and on a busy machine threads that wait for each other cost a lot.
# The tests of exactness set more themselves.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def padding() -> Iterator[None]:
    """What one test settles is no other test's business."""
    before = PADDING.rows
    yield
    PADDING.rows = before


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("models")

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_model(family, root / family)
        return made[family]

    return get
