"""What other programs make of every family's adapters: the cookbook's converters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.engine.export.trained import ROWS, Trained, load_transformers, make_trained

# The cookbook's converter knows Qwen3.5 by the type of its whole model; the text model alone has another.
WHOLE = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}
# It names files' tensors as the modules are named, which this family's files do not; it can also
# go by the modules of a loaded model.
BY_MODULES = {"KimiLinear"}


@pytest.fixture(scope="module", params=ROWS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return make_trained(request.param, tmp_path_factory.mktemp("trained"))


class TestFamily:
    def test_tinkers_format_goes_through_the_cookbooks_converter(
        self, trained: Trained, tmp_path: Path
    ) -> None:
        weights = pytest.importorskip("tinker_cookbook.weights")
        config = json.loads((trained.base / "config.json").read_text())
        base = trained.base
        if config["model_type"] in WHOLE:
            base = shutil.copytree(base, tmp_path / "base")
            whole = {**config, "model_type": WHOLE[config["model_type"]]}
            (base / "config.json").write_text(json.dumps(whole))
        weights.build_hf_model(
            base_model=str(base),
            adapter_path=str(trained.adapter),
            output_path=str(tmp_path / "merged"),
            dtype="float32",
            merge_strategy="full" if trained.row in BY_MODULES else "shard",
        )
        (tmp_path / "merged" / "config.json").write_text(json.dumps(config))
        merged = load_transformers(tmp_path / "merged")
        take_apart_what_is_tied(merged, trained.base)
        trained.check(merged)


def take_apart_what_is_tied(merged: PreTrainedModel, base: Path) -> None:
    """The cookbook adds a tied unembedding's adapter to the matrix that embeds, too, and so changes what goes
    in; training changed what comes out alone. Give the input the base's matrix."""
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    if head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone())
        embedding.weight = torch.nn.Parameter(load_transformers(base).get_input_embeddings().weight.detach())
