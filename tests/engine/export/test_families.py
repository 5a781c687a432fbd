"""What other programs make of every family's adapters: the cookbook, PEFT, vLLM, transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests.engine.export.trained import ROWS, Trained, load_transformers, make_trained
from tests.engine.export.vllm_reader import merge_as_vllm
from tinsmith.engine.export import export

# The cookbook's converter knows Qwen3.5 by the type of its whole model; the text model alone has another.
WHOLE = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}
# It names files' tensors as the modules are named, which this family's files do not; it can also
# go by the modules of a loaded model.
BY_MODULES = {"KimiLinear"}
# Rows that the cookbook converts for vLLM, and in the same way.
SERVED = {"Llama", "Qwen3", "Qwen3Moe", "Qwen3Next", "NemotronH", "GptOss", "Mistral", "Olmo3", "Phi3"}


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

    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
    def test_exported_for_peft_it_loads_there(self, trained: Trained, tmp_path: Path) -> None:
        export(trained.adapter, trained.name, str(trained.base), "peft", tmp_path / "out")
        module = PeftModel.from_pretrained(load_transformers(trained.base), tmp_path / "out")
        trained.check(module)
        # What was loaded is all that there is: nothing was made up, nothing left over.
        own = {
            name for name, _ in module.named_parameters() if ".lora_" in name or ".modules_to_save." in name
        }
        assert len(own) == len(load_file(tmp_path / "out" / "adapter_model.safetensors"))

    def test_exported_for_vllm_its_matrices_are_the_adapter(self, trained: Trained, tmp_path: Path) -> None:
        if trained.tied:
            trained = make_trained(trained.row, tmp_path, train_unembed=False)
        keep = {"lm_head", "kv_b_proj"} & trained.modules
        export(trained.adapter, trained.name, str(trained.base), "vllm", tmp_path / "out", keep=keep)
        merge_as_vllm(trained.base, tmp_path / "out", tmp_path / "merged")
        trained.check(load_transformers(tmp_path / "merged"))

    @pytest.mark.parametrize("trained", sorted(SERVED), indirect=True)
    def test_exported_for_vllm_it_is_what_the_cookbook_makes(self, trained: Trained, tmp_path: Path) -> None:
        weights = pytest.importorskip("tinker_cookbook.weights")
        export(trained.adapter, trained.name, str(trained.base), "vllm", tmp_path / "a", keep=("lm_head",))
        weights.build_lora_adapter(
            base_model=str(trained.base), adapter_path=str(trained.adapter), output_path=str(tmp_path / "b")
        )
        ours, theirs = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        ours, theirs = (json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in "ab")
        assert ours["target_modules"] == theirs["target_modules"]
        assert ours["lora_alpha"] / ours["r"] == theirs["lora_alpha"] / theirs["r"]

    def test_merged_it_is_a_model_of_its_own(self, trained: Trained, tmp_path: Path) -> None:
        export(trained.adapter, trained.name, str(trained.base), "merged", tmp_path / "out")
        trained.check(load_transformers(tmp_path / "out"))


def take_apart_what_is_tied(merged: PreTrainedModel, base: Path) -> None:
    """The cookbook adds a tied unembedding's adapter to the matrix that embeds, too, and so changes what goes
    in; training changed what comes out alone. Give the input the base's matrix."""
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    if head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(embedding.weight.detach().clone())
        embedding.weight = torch.nn.Parameter(load_transformers(base).get_input_embeddings().weight.detach())
