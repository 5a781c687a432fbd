"""A family's model with an adapter that was trained a little, and what others make of the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedModel

from tests.engine.test_training import sequences, train
from tests.engine.tiny import load, logprobs, make_run, make_vision_model, relative, request
from tests.families import FAMILIES, make
from tinsmith.engine import adapter_files
from tinsmith.engine.commands import AdamParams
from tinsmith.engine.model.adapted import UNEMBED
from tinsmith.engine.model.vision import auto_class
from tinsmith.engine.runs import Run

EYES = {"Qwen3VL-eyes": "Qwen3VL", "Qwen3_5-eyes": "Qwen3_5"}  # whole models with a vision tower
ROWS = [*FAMILIES, *EYES]
TEXTS = sequences(0, (40, 5, 30))


@dataclass
class Trained:
    """A base model's folder, an adapter of it in Tinker's format, and our own logprobs with it."""

    row: str
    base: Path
    adapter: Path
    run: Run
    logprobs: list[np.ndarray]

    @property
    def name(self) -> str:
        return self.run.model.name

    @property
    def tied(self) -> bool:
        module = self.run.model.module
        return module.get_input_embeddings().weight is module.get_output_embeddings().weight

    @property
    def modules(self) -> set[str]:
        """What the adapter's parts are called, by transformers."""
        names = {slot.name for slot in self.run.layout.slots}
        return {"lm_head" if name == UNEMBED else name.rpartition(".")[2] for name in names}

    def check(self, module: Any, most: float = 1e-5) -> None:
        """That transformers' `module` is this model with this adapter."""
        for ours, text in zip(self.logprobs, TEXTS, strict=True):
            assert relative(ours, logprobs_of(module, text)) < most


def make_trained(row: str, root: Path, **flags: bool) -> Trained:
    """`flags` are train_attn, train_mlp and train_unembed."""
    if row in EYES:
        base = root / row
        if not base.exists():
            make_vision_model(EYES[row], base)
    else:
        base = make(row, root)
    run = make_run(load(base), rank=4, **flags)
    train(run, request(TEXTS))
    run.optimize(AdamParams(learning_rate=1e-2))
    adapter = root / f"{row}-adapter{''.join(f'-{name}' for name, on in flags.items() if not on)}"
    adapter_files.write(str(adapter), run.model, run.layout, run.live, optimizer=None, gradients=False)
    return Trained(row, base, adapter, run, logprobs(train(run, request(TEXTS, forward_only=True))))


def load_transformers(folder: Path) -> PreTrainedModel:
    """What transformers makes of a folder, in the precision of its reference."""
    config = AutoConfig.from_pretrained(folder)
    module = auto_class(config).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return module.eval()


@torch.no_grad()
def logprobs_of(module: Any, text: Sequence[int]) -> torch.Tensor:
    """transformers' logprobs of text[1:]."""
    ids = torch.tensor(text)
    table = torch.log_softmax(module(input_ids=ids[None, :-1], use_cache=False).logits[0].float(), -1)
    return table.gather(1, ids[1:, None])[:, 0]
