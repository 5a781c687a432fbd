"""Rotations whose frequencies depend on how long a sequence is (LongRoPE).

transformers takes the largest position of a pass for the length of what is in it. Here a pass has many
sequences, or a part of one: so each row is told by its own sequence's length which frequencies are its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.engine.model.errors import ModelError
from tinsmith.engine.model.packing import current_pass


@torch.no_grad()
def find_threshold(body: nn.Module, config: Any, limit: int, device: torch.device) -> int | None:
    """The tokens of a sequence beyond which the rotations below `body` are others; None where no sequence of
    up to `limit` tokens is that long. Those rotations go by `Pass.long` from now on. Raises ModelError."""
    found: set[int] = set()
    for module in body.modules():
        names = inspect.signature(module.forward).parameters
        if "position_ids" not in names or any(True for _ in module.children()) or limit < 3:
            continue
        kinds = sorted(set(getattr(config, "layer_types", None) or ())) if "layer_type" in names else []
        rules = [({"layer_type": kind} if kinds else {}) for kind in kinds or [""]]
        mine = {most for rule in rules if (most := _threshold(module, rule, limit, device)) is not None}
        for most in mine:
            module.forward = partial(_forward, module.forward, most)
            module.tinsmith_rotates = True  # type: ignore[assignment]  # what it keeps is of no sequence
        found |= mine
    if len(found) > 1:
        raise ModelError(
            f"its rotations change at {sorted(found)} tokens, where one length is known to change them"
        )
    return next(iter(found), None)


def long_rows(
    most: int | None, spans: Iterable[tuple[int, int, int]], rows: int, device: torch.device
) -> Tensor | None:
    """For Pass.long: spans are (first row, number of rows, tokens of the whole sequence); bool [rows], or
    None where no sequence has more than `most` tokens."""
    if most is None:
        return None
    long = torch.zeros(rows, dtype=torch.bool)
    for start, count, length in spans:
        long[start : start + count] = length > most
    return long.to(device) if bool(long.any()) else None


def _threshold(module: nn.Module, rule: dict[str, str], limit: int, device: torch.device) -> int | None:
    def frequencies(length: int) -> list[Tensor]:
        """What position 1 is turned by in a sequence of so many tokens."""
        positions = torch.tensor([[1, length - 1]], device=device)
        made = module(torch.zeros(1, 2, 1, device=device), positions, **rule)
        return [x[..., :1, :].clone() for x in (made if isinstance(made, tuple) else (made,))]

    def differ(a: list[Tensor], b: list[Tensor]) -> bool:
        return any(not torch.equal(x, y) for x, y in zip(a, b, strict=True))

    try:
        short, long = frequencies(2), frequencies(limit)
    except Exception:
        return None  # no rotation, or one that wants to know more: nothing of it is replaced
    if not differ(short, long):
        return None
    low, high = 2, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if differ(short, frequencies(middle)) else (middle, high)
    if differ(frequencies(low + 1), frequencies(limit)) or differ(short, frequencies(low)):
        raise ModelError(
            f"its rotations are others for every length beyond {low} tokens; that is not known here. Set "
            f"max_position_embeddings to {low} in config.json to serve it up to there"
        )
    return low


def _forward(
    original: Callable[..., Any], most: int, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
) -> Any:
    this = current_pass()
    if this is None:
        return original(x, position_ids, *args, **kwargs)
    short = original(x, position_ids.clamp(max=most - 1), *args, **kwargs)
    if this.long is None:
        return short
    made = original(x, F.pad(position_ids, (0, 1), value=most), *args, **kwargs)
    row = this.long[:, None]
    if isinstance(short, tuple):
        return tuple(torch.where(row, b[..., :-1, :], a) for a, b in zip(short, made, strict=True))
    return torch.where(row, made[..., :-1, :], short)
