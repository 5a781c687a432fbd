"""What stands before and behind a model's layers, as the model's own code has it.

Most families take what the unembedding gives. Others scale it (Granite, Cohere) or cap it (Gemma), in the
forward of the model around body and unembedding: that code is run, on hidden states that are there already.
And some scale embeddings that they look up, but not those that they are given (Falcon-H1).
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
    called = bool(seen)
    made = seen[-1] if called else body(input_ids=token_ids.unsqueeze(0), use_cache=False)
    states = made.last_hidden_state[0]
    alike = states.dtype is head.weight.dtype  # else the model's own forward casts them
    if alike and torch.equal(head(states).to(logits.dtype), logits):
        return head
    if not called:
        raise RuntimeError("its forward does not go through its body")

    def unembed(hidden: Tensor) -> Tensor:
        states = hidden.unsqueeze(0)
        with _in_place_of(body, lambda *_, **__: type(made)(last_hidden_state=states)):
            found: Tensor = module(inputs_embeds=states, use_cache=False).logits[0]
        return found

    return unembed


@torch.no_grad()
def find_scale(body: nn.Module, embed: nn.Module, config: Any, token_ids: Tensor) -> float | None:
    """By which number of its config a body multiplies the embeddings of `token_ids` [n], where it does so
    only if it looks them up itself. None where there is nothing to multiply by."""
    layers = next((m for m in body.children() if isinstance(m, nn.ModuleList) and len(m)), None)
    if layers is None:
        return None
    ids = token_ids.unsqueeze(0)
    embedded = embed(ids)

    def enters(**inputs: Tensor) -> Tensor | None:
        """What comes to the first layer."""
        seen: list[Tensor] = []

        def look(_: Any, args: Any, kwargs: Any) -> None:
            seen.extend(x.clone() for x in (*args, *kwargs.values())[:1] if isinstance(x, Tensor))

        handle = layers[0].register_forward_pre_hook(look, with_kwargs=True)
        try:
            body(**inputs, use_cache=False)
        finally:
            handle.remove()
        return seen[0] if seen else None

    wanted = enters(input_ids=ids)

    def suits(scale: float) -> bool:
        found = enters(inputs_embeds=embedded * scale)
        return wanted is None or (found is not None and torch.equal(found, wanted))

    numbers = {x for x in config.to_dict().values() if isinstance(x, float)}
    return None if suits(1.0) else next(filter(suits, sorted(numbers)), None)


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
