"""Layers whose activations are not kept for the backward pass but computed again in it, where memory needs
it.

The layers are those that transformers itself can checkpoint. What is computed again has the bits of the first
time, since nothing here is random; gradients of adapters are added where a layer is differentiated, which is
done once, so that nothing is added twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tinsmith.engine.model.packing import current_pass, running


def make_recomputable(body: nn.Module) -> int:
    """Let passes that ask for it (Pass.recomputes) compute the layers of `body` again; returns how many."""
    layers = [m for m in body.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = partial(_forward, layer.forward)
    return len(layers)


def _forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    this = current_pass()
    if this is None or not this.recomputes or not torch.is_grad_enabled():
        return original(*args, **kwargs)

    def again(*args: Any, **kwargs: Any) -> Any:
        # Backward runs in a thread of autograd's own on a GPU, which knows no current pass.
        with running(this):
            return original(*args, **kwargs)

    return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
