"""From final hidden states to logits, by the model's own code.

Most families take what the unembedding gives. Others scale it (Granite, Cohere) or cap it (Gemma), in the
forward of the model around body and unembedding: that code is run, on hidden states that are there already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Unembedding = Callable[[Tensor], Tensor]  # [n, hidden] -> logits [n, vocab]


@torch.no_grad()
def find_unembedding(module: Any, body: nn.Module, token_ids: Tensor) -> Unembedding:
    """The head alone, where it gives the logits that the whole model gives of `token_ids` [n]; else what runs
    the model's own forward around it."""
    head: nn.Module = module.get_output_embeddings()
    seen: list[Any] = []
    original = body.forward

    def keep(*args: Any, **kwargs: Any) -> Any:
        seen.append(original(*args, **kwargs))
        return seen[-1]

    with _in_place_of(body, keep):
        logits = module(input_ids=token_ids.unsqueeze(0), use_cache=False).logits[0]
    made = seen[-1]
    if torch.equal(head(made.last_hidden_state[0]).to(logits.dtype), logits):
        return head

    def unembed(hidden: Tensor) -> Tensor:
        states = hidden.unsqueeze(0)
        with _in_place_of(body, lambda *_, **__: type(made)(last_hidden_state=states)):
            found: Tensor = module(inputs_embeds=states, use_cache=False).logits[0]
        return found

    return unembed


@contextmanager
def _in_place_of(body: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Call `forward` instead of the body's own."""
    before = vars(body).get("forward")
    body.forward = forward
    try:
        yield
    finally:
        if before is None:
            del body.forward
        else:
            body.forward = before
