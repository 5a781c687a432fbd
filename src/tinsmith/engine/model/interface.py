"""What transformers' attention interface calls: this server's attention, and, once, what finds out whether it
does for a model.

It knows sequences that see all that is before them, or a window of it. Some families see otherwise beyond a
length that no short trial reaches (Llama 4's chunks); transformers describes every mask by a function of two
positions, which is asked about far ones, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tinsmith.engine.model.packing import current_pass

OWN = "tinsmith"  # the attention's name in the interface; it gets no masks
MEASURED = "tinsmith_measured"  # the same with masks, which say by what function they are made
_FAR = 1 << 20
_TRIED = 300  # positions, each against each

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # batch, head, query, key -> bool


class Unknown(Exception):
    """An attention that this server's own does not do: the model takes the generic path."""


def _mask(
    *, batch_size: int, q_length: int, kv_length: int, mask_function: Sees, device: Any, **_: Any
) -> Tensor:
    mask = torch.zeros(batch_size, 1, q_length, kv_length, device=device)
    mask.tinsmith_sees = mask_function  # type: ignore[attr-defined]
    return mask


def _is_window(mask: Tensor, window: int | None, limit: int | None) -> bool:
    """Whether a mask made here lets each query see itself and what is before it, or of that the last `window`
    positions; up to `limit` positions."""
    sees: Sees | None = getattr(mask, "tinsmith_sees", None)
    if sees is None:
        return False
    limit = limit or _FAR
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(0, limit, (_TRIED,), generator=generator)
    edges = [] if window is None else [some[: _TRIED // 3] - window + i for i in (-1, 0, 1)]
    at = torch.cat([torch.arange(32), some, *edges]).clamp(0, limit - 1).unique()
    at = at if mask.is_meta else at.to(mask.device)
    query, key, zero = at[:, None], at[None, :], at.new_zeros(())
    own = key <= query
    if window is not None:
        own &= key > query - window
    try:
        return torch.equal(sees(zero, zero, query, key).expand_as(own), own)
    except (IndexError, RuntimeError):  # it knows the places of this pass alone
        return False


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, heads, rows, dim] each -> [1, rows, heads, dim]."""
    if softcap is not None:
        raise Unknown(f"{type(module).__name__} caps its attention scores")
    if attention_mask is not None:
        raise Unknown(f"{type(module).__name__} masks its attention by itself")
    this = current_pass()
    if this is None or this.attention is None:
        raise RuntimeError("attention runs inside a pass only")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    module.tinsmith_attends = True  # type: ignore[assignment]  # see adapted.py
    out = this.attention(layer, query[0], key[0], value[0], scale, sliding_window, s_aux)
    return out.unsqueeze(0), None


def _measured(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    """As `_attention`, which sees to it that the mask is one that needs no mask."""
    limit = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    if attention_mask is not None and not _is_window(attention_mask, rest.get("sliding_window"), limit):
        raise Unknown(f"{type(module).__name__} sees neither all that is before a token nor a window of it")
    return _attention(module, query, key, value, None, **rest)


ALL_ATTENTION_FUNCTIONS.register(OWN, _attention)
ALL_ATTENTION_FUNCTIONS.register(MEASURED, _measured)
ALL_MASK_ATTENTION_FUNCTIONS.register(MEASURED, _mask)
