"""What is wrong with a request, said so that its sender can repair it."""

from __future__ import annotations


class WireError(ValueError):
    """A request that cannot be read: which field, what is wrong with it, and what would be right."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}" if field else problem)
        self.field = field
        self.problem = problem


class BodyTooLarge(WireError):
    """A body that grows beyond the limit. `prefix` is what came before: a request's first fields."""

    def __init__(self, limit: int, prefix: bytes) -> None:
        super().__init__(
            "body",
            f"larger than {limit} bytes after decompression, which is this server's limit;"
            " send fewer or shorter datums in one request",
        )
        self.prefix = prefix
