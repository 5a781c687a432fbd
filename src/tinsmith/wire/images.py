"""An image as a request brings it. Nothing here looks into its bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImageChunk:
    """An image of a model input, undecoded.

    `chunk` is its index among the input's chunks, `at` the number of text tokens before it. `format` is
    what the request says. `size` (width, height) is what the image is to be resized to first, if anything.
    """

    chunk: int
    at: int
    data: bytes
    format: str
    expected_tokens: int | None = None
    size: tuple[int, int] | None = None
