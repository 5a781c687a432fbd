"""What the scripts that hold a server against Tinker's documentation have in common."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator

number, failed = 0, []


@contextlib.contextmanager
def call(title: str) -> Iterator[None]:
    """One numbered call with its checks."""
    global number
    number += 1
    began = time.monotonic()
    try:
        yield
    except Exception:
        failed.append(number)
        print(f"{number:3} FAILED {title}\n{traceback.format_exc()}", flush=True)
    else:
        print(f"{number:3} ok     {title} ({time.monotonic() - began:.2f} s)", flush=True)


def refused(work: Callable[[], object], kind: type[Exception], *words: str) -> None:
    """The call must fail as documented, and say why."""
    try:
        work()
    except kind as error:
        for word in words:
            if word not in str(error):
                raise AssertionError(f"{word!r} is not in {error}") from error
    else:
        raise AssertionError(f"it was not refused with {kind.__name__}")


def close(one: float, other: float, within: float = 1e-3) -> bool:
    return math.isclose(one, other, rel_tol=within, abs_tol=within)


def end() -> None:
    """Say how many calls there were, and end with 1 if one of them did not do as documented."""
    print(f"{number} calls, {len(failed)} not as documented{f': {failed}' if failed else ''}")
    sys.exit(1 if failed else 0)
