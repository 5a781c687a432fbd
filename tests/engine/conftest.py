"""One folder per tiny model, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.tiny import make_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("models")

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_model(family, root / family)
        return made[family]

    return get
