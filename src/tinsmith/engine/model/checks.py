"""What a model must pass when it is loaded, before a run may trust it.

Which architectures train and sample here is not a list of names: two short sequences are run packed and
apart, and one through transformers' own attention. A family whose layers carry state along the row
dimension (linear attention, Mamba), or whose attention has a feature that ours lacks, is refused by name
rather than trained wrongly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinsmith.engine.model.attention import pad_rows
from tinsmith.engine.model.base import BaseModel, ModelError
from tinsmith.engine.model.packing import PackedSequences, Pass, Segment

_LENGTHS = (21, 12)
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@torch.no_grad()
def check(model: BaseModel) -> None:
    """Raises ModelError, naming the architecture and what disagrees."""
    architecture = type(model.module).__name__
    for group in ("attn", "mlp"):
        if not any(slot.group == group for slot in model.slots):
            raise ModelError(
                f"{model.name}: {architecture} has no linear layer that counts as {group}, so an adapter "
                "would miss it; such models cannot be served yet"
            )
    layers = int(getattr(model.config, "num_hidden_layers", 0))
    if len(model.attention_layers) != layers:
        raise ModelError(
            f"{model.name}: {architecture} has {layers} layers, but only {len(model.attention_layers)} of "
            "them are attention; models with recurrent layers (linear attention, Mamba) cannot be served yet"
        )
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, model.vocab_size, (n,), generator=generator) for n in _LENGTHS)
    together = _hidden(model, [first, second])
    for name, text, ours in (
        ("first", first, together[: len(first)]),
        ("second", second, together[len(first) :]),
    ):
        if _differs(ours, _hidden(model, [text]), model.dtype):
            raise ModelError(
                f"{model.name}: {architecture} gives the {name} of two packed sequences another result than "
                "the sequence by itself; such models cannot be served yet"
            )
    if _differs(_plain(model, first), _hidden(model, [first]), model.dtype):
        raise ModelError(
            f"{model.name}: {architecture} has an attention that differs from this server's; such models "
            "cannot be served yet"
        )


def _hidden(model: BaseModel, texts: list[Tensor]) -> Tensor:
    """Hidden states of the texts' tokens, packed."""
    tokens = torch.cat(texts)
    rows = pad_rows(len(tokens))
    ids, positions = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    spans, at = [], 0
    for text in texts:
        spans.append((at, len(text)))
        ids[at : at + len(text)], positions[at : at + len(text)] = text, torch.arange(len(text))
        at += len(text)
    this = Pass([Segment(0, rows, None)], PackedSequences(spans, rows, model.device))
    return model.hidden(ids.to(model.device), positions.to(model.device), this)[:at]


def _plain(model: BaseModel, text: Tensor) -> Tensor:
    """Hidden states of one text by transformers' own eager attention."""
    model.module.set_attn_implementation("eager")
    try:
        ids, positions = text.to(model.device), torch.arange(len(text), device=model.device)
        return model.hidden(ids, positions, Pass([Segment(0, len(text), None)]))
    finally:
        model.module.set_attn_implementation("tinsmith")


def _differs(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    a, b = a.double(), b.double()
    return not bool((a - b).norm() <= _TOLERANCE[dtype] * b.norm())
