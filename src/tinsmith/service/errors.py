"""Why a call is refused as a whole. What is wrong with a training request's content is no error here:
it becomes the outcome of that request's future."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .limits import Reached


class ServiceError(Exception):
    """A call that cannot be carried out; `detail` tells its sender what to do about it."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class Refused(ServiceError):
    """The call asks for something that is wrong or not offered."""


class Unauthorized(ServiceError):
    """No valid API key."""


class InvalidToken(Unauthorized):
    """A token that is none, or not any more. The SDK gets itself a new one."""


class Forbidden(ServiceError):
    """A valid key, but not one that may do this."""


class NotFound(ServiceError):
    """There is no such thing, or it is somebody else's, which looks the same."""


class Gone(ServiceError):
    """It existed, and will not come back."""


class Unavailable(ServiceError):
    """Not now: starting, or shutting down. Trying again helps."""


class Limited(ServiceError):
    """A limit of the caller's organization or project is reached; `reached` says which and how."""

    def __init__(self, reached: Reached) -> None:
        super().__init__(str(reached))
        self.reached = reached

    @property
    def retry_after(self) -> int:
        """Seconds after which trying again may help."""
        left = self.reached.resets_in
        return max(1, math.ceil(left)) if left is not None else 1


class OverLimit(Limited):
    """Too much at once, or within a minute."""


class OverBudget(Limited):
    """The month's budget is spent."""


class Unwritable(ServiceError):
    """The disk takes no more. Answered so that a client gives up at once: trying again for minutes does
    not make room."""

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"the server cannot write to its disk ({error}); nothing was changed. Make room in its data"
            " folder, then try again"
        )


class Refusal(Exception):
    """A training request's content is refused; the message becomes its future's error."""
