"""Checkpoint paths agree with the SDK's, and names cannot leave."""

from __future__ import annotations

import pytest
from tinker.types.checkpoint import ParsedCheckpointTinkerPath

from tinsmith.wire.errors import WireError
from tinsmith.wire.paths import TinkerPath, check_name


@pytest.mark.parametrize(
    "text",
    [
        "tinker://run/weights/a",
        "tinker://s:train:0/sampler_weights/step-1",
        "tinker://run/external_weights/x",
        "tinker://run/weights",
        "tinker://run/weights/a/b",
        "tinker://run/other/a",
        "http://run/weights/a",
        "",
    ],
)
def test_a_path_is_read_as_the_sdk_reads_it(text: str) -> None:
    try:
        theirs = ParsedCheckpointTinkerPath.from_tinker_path(text)
    except ValueError:
        with pytest.raises(WireError, match="path"):
            TinkerPath.parse(text)
        return
    ours = TinkerPath.parse(text)
    assert (ours.run, ours.kind, ours.checkpoint_id) == (
        theirs.training_run_id,
        theirs.checkpoint_type,
        theirs.checkpoint_id,
    )
    assert str(ours) == text
    assert TinkerPath.from_checkpoint_id(ours.run, ours.checkpoint_id) == ours


@pytest.mark.parametrize("name", ["a", "000010", "step-1.5_final", "lr=1e-4", "a b", "x" * 256, "..a"])
def test_ordinary_names_are_taken(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "...", " ", "a/b", "../a", "a\\b", "a\0", "ä\n", "x" * 257])
def test_names_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(WireError, match="path"):
        check_name(name)
