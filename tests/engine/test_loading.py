"""Loading models as published: formats, dtypes, shards, and folders that something is wrong with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.engine.tiny import make_family, relative, tokens
from tests.families import FAMILIES, make, make_odd
from tests.quantized import FORMATS, compressed, full, quantize
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.blueprint import draw
from tinsmith.engine.model.checkpoint import open_checkpoint
from tinsmith.engine.model.checks import check
from tinsmith.engine.model.errors import ModelError
from tinsmith.engine.model.loading import Loaded, fingerprint, load
from tinsmith.engine.model.quantization import full_weights

CPU = torch.device("cpu")
ROWS = {"int4": "DeepseekV3", "mxfp4": "GptOss"}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Family = Callable[[str], Path]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("families")
    return lambda row: make(row, root)


@pytest.fixture
def model(family: Family, tmp_path: Path) -> Path:
    """A folder that a test may break."""
    return Path(shutil.copytree(family("Qwen3Moe"), tmp_path / "model"))


def loaded(
    folder: Path | str, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False
) -> Loaded:
    return load(str(folder), CPU, dtype, trust_remote_code=trust_remote_code)


def refusal(folder: Path | str, **more: bool) -> str:
    with pytest.raises(ModelError) as caught:
        loaded(folder, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same(
    folder: Path, reference: Path, dtype: torch.dtype = torch.float32, auto: Any = AutoModelForCausalLM
) -> None:
    """All tensors, buffers too, are those that transformers loads."""
    ours = loaded(folder, dtype).module
    theirs = auto.from_pretrained(reference, dtype=dtype)
    expected = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    found = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def set_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def shard(folder: Path, count: int = 3) -> None:
    """Spread the weights over files as large models have them, experts of a layer too."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    where: dict[str, str] = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[number::count]}
        save_file(part, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


class TestFull:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("row", ["DeepseekV3", "NemotronH"])
    def test_weights_in_any_dtype(
        self, family: Family, tmp_path: Path, row: str, stored: torch.dtype, dtype: torch.dtype
    ) -> None:
        """Both have weights that stay in fp32, whatever is computed in."""
        folder = Path(shutil.copytree(family(row), tmp_path / "model"))
        change_weights(folder, lambda t: t.update({k: v.to(stored) for k, v in t.items()}))
        assert_same(folder, folder, dtype)

    def test_weights_in_several_files(self, model: Path, family: Family) -> None:
        shard(model)
        assert_same(model, family("Qwen3Moe"))

    def test_tensors_that_belong_to_nothing_are_left_alone(self, model: Path, family: Family) -> None:
        """As layers for multi-token prediction."""
        change_weights(model, lambda t: t.update({"model.layers.2.eh_proj.weight": torch.ones(3, 3)}))
        assert_same(model, family("Qwen3Moe"))

    @pytest.mark.parametrize("same", [True, False])
    def test_a_tied_unembedding_that_is_in_the_file_too(
        self, family: Family, tmp_path: Path, same: bool
    ) -> None:
        folder = Path(shutil.copytree(family("Llama-tied"), tmp_path / "model"))
        change_weights(
            folder,
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + (0.0 if same else 1.0)}),
        )
        assert_same(folder, folder)
        found = loaded(folder).module
        assert (found.lm_head.weight is found.model.embed_tokens.weight) == same

    def test_kimi_k2_is_deepseek_v3(self, family: Family, tmp_path: Path) -> None:
        """transformers does not have that name; its tokenizer's and its own class lie beside it as code."""
        folder = Path(shutil.copytree(family("DeepseekV3"), tmp_path / "model"))
        auto_map = {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        }
        set_config(folder, model_type="kimi_k2", auto_map=auto_map)
        assert_same(folder, family("DeepseekV3"))

    def test_kimi_k25_has_its_language_model_under_other_names(self, tmp_path: Path) -> None:
        """And its scales' format in the language model's part of the config."""
        folder = tmp_path / "kimi"
        tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        settings = {
            "text_config": FAMILIES["DeepseekV3"],
            "vision_config": tower,
            "projection_hidden_size": 32,
            "tie_word_embeddings": False,
        }
        make_family("Kimi_K25", "ForConditionalGeneration", folder, settings)
        published = {
            name.replace("language_model.model.blocks", "language_model.model.layers"): x
            for name, x in load_file(folder / WEIGHTS).items()
        }
        assert "language_model.model.layers.1.mlp.experts.0.down_proj.weight" in published
        save_file(published, folder / WEIGHTS, {"format": "pt"})
        text = json.loads((folder / "config.json").read_text())["text_config"]
        quantized = quantize(folder, tmp_path / "int4", "int4")
        text |= {"model_type": "kimi_k2", "quantization_config": FORMATS["int4"][2]}
        set_config(quantized, architectures=["KimiK25ForConditionalGeneration"], text_config=text)
        set_config(quantized, quantization_config=None)
        assert_same(quantized, full(quantized), auto=AutoModelForImageTextToText)

    def test_of_a_hub_id_what_it_needs_is_fetched_and_no_more(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shard(model)
        for other in ("consolidated.safetensors", "pytorch_model.bin", "odd.py", "README.md"):
            (model / other).write_text("x")
        here = tmp_path / "cache"
        here.mkdir()

        def download(name: str, allow_patterns: list[str]) -> str:
            assert name == "org/name"
            for file in model.iterdir():
                if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                    shutil.copy(file, here)
            return str(here)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        draw("org/name", torch.float32)
        with pytest.raises(ModelError, match="1000 are left"):
            load("org/name", CPU, torch.float32, room=1000)
        assert {file.name for file in here.iterdir()} == {"config.json"}
        found = load("org/name", CPU, torch.float32)
        assert found.folder == here
        weights = {f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
        assert {file.name for file in here.glob("*.safetensors")} == weights
        assert not (here / "odd.py").exists()
        load("org/name", CPU, torch.float32, trust_remote_code=True)
        assert (here / "odd.py").exists()


class TestQuantized:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("name", FORMATS)
    def test_the_weights_are_those_that_were_quantized(
        self, family: Family, tmp_path: Path, name: str, dtype: torch.dtype
    ) -> None:
        """Experts too, of which transformers makes one tensor of three dimensions a layer."""
        folder = quantize(family(ROWS.get(name, "Qwen3Moe")), tmp_path / "model", name)
        assert_same(folder, full(folder), dtype)
        assert loaded(folder).quantized

    def test_weights_and_scales_may_be_in_different_files(self, family: Family, tmp_path: Path) -> None:
        folder = quantize(family("Qwen3Moe"), tmp_path / "model", "fp8")
        shard(folder)
        assert_same(folder, full(folder))

    def test_experts_of_one_format_and_attention_of_another(self, family: Family, tmp_path: Path) -> None:
        """As Kimi's: what a tensor is, its own name and dtype say."""
        experts = quantize(family("DeepseekV3"), tmp_path / "experts", "int4")
        both = quantize(full(experts), tmp_path / "both", "fp8")
        for target, source in ((both, experts), (full(both), full(experts))):
            own = {k: v for k, v in load_file(source / WEIGHTS).items() if ".experts." in k}
            kept = {k: v for k, v in load_file(target / WEIGHTS).items() if ".experts." not in k}
            save_file({**kept, **own}, target / WEIGHTS, {"format": "pt"})
        settings = compressed("mixed-precision", 4, group=16)
        blocks = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [48, 48]}
        settings["config_groups"]["group_1"] = {"weights": blocks, "format": "float-quantized"}
        set_config(both, quantization_config=settings)
        assert_same(both, full(both))

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"quant_method": "awq", "bits": 4}, "awq"),
            ({"quant_method": "gptq", "bits": 4}, "gptq"),
            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
            ({"load_in_8bit": True}, "bitsandbytes"),
            ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
            ({"quant_method": "quark"}, "quark"),
            ({"quant_method": "torchao"}, "torchao"),
            ({"quant_method": "tomorrow's"}, "tomorrow's"),
            ({}, "no name"),
            (compressed("nvfp4-pack-quantized", 4, "float"), "nvfp4-pack-quantized"),
            (compressed("mxfp4-pack-quantized", 4, "float"), "mxfp4-pack-quantized"),
            (compressed("marlin-24", 4), "marlin-24"),
            (compressed("pack-quantized", 3), "3 bits"),
            (compressed("pack-quantized", 4, symmetric=False), "zero points"),
            (compressed("pack-quantized", 4, actorder="group"), "actorder"),
            ({**compressed("dense", 8), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
        ],
    )
    def test_a_format_without_a_dequantizer_is_refused_by_name(
        self, model: Path, settings: dict, named: str
    ) -> None:
        (model / WEIGHTS).unlink()  # it is not even looked for
        set_config(model, quantization_config={**settings, "x": 1})
        said = refusal(model)
        assert str(model / "config.json") in said
        assert named in said
        assert "no dequantizer" in said

    @pytest.mark.parametrize(
        ("name", "end", "said"),
        [
            ("fp8", "_scale_inv", "there is no model.layers.0.self_attn.q_proj.weight_scale_inv"),
            ("int4", "_scale", "no model.layers.1.mlp.experts.3.up_proj.weight_scale"),
            ("int4", "_shape", "no model.layers.1.mlp.experts.3.up_proj.weight_shape"),
        ],
    )
    def test_a_scale_that_is_not_there(
        self, family: Family, tmp_path: Path, name: str, end: str, said: str
    ) -> None:
        folder = quantize(family(ROWS.get(name, "Qwen3Moe")), tmp_path / "model", name)
        absent = said.split()[-1]
        assert absent.endswith(end)
        change_weights(folder, lambda t: t.pop(absent))
        assert said in refusal(folder)

    def test_scales_of_another_shape(self, family: Family, tmp_path: Path) -> None:
        folder = quantize(family("Qwen3Moe"), tmp_path / "model", "fp8")
        name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
        change_weights(folder, lambda t: t.update({name: torch.ones(5, 3)}))
        assert f"{name}, float32 [5, 3], does not suit" in refusal(folder)

    @pytest.mark.parametrize("shape", [(4, 1), (4, 8), (4, 8, 1), (4,), ()], ids=str)
    def test_scales_of_fused_experts(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        """One a matrix, one a row of each, or one for all."""
        weight, scale = torch.randn(4, 8, 16).to(torch.float8_e4m3fn), torch.rand(shape)
        save_file({"w": weight, "w_scale": scale}, tmp_path / WEIGHTS)
        made = torch.empty(4, 8, 16)
        full_weights(open_checkpoint(tmp_path), {})["w"].read(made)
        assert torch.equal(made, weight.float() * scale.view(*shape, *[1] * (3 - len(shape))))

    @pytest.mark.parametrize(
        ("name", "end", "change", "said"),
        [
            ("mxfp4", "down_proj_scales", lambda x: x[:2].clone(), "are no MXFP4"),
            ("mxfp4", "down_proj_scales", lambda x: x.float(), "are no MXFP4"),
            ("mxfp4", "down_proj_blocks", lambda x: x.flatten(2), "are no MXFP4"),
            ("int4", "_shape", lambda x: torch.cat([x, x[:1]]), "where two numbers are expected"),
            ("int4", "_shape", lambda x: x.float(), "where two numbers are expected"),
            ("fp8", "_scale_inv", lambda x: x.int(), "does not suit"),
        ],
    )
    def test_what_is_no_scale_of_its_kind(
        self,
        family: Family,
        tmp_path: Path,
        name: str,
        end: str,
        change: Callable[[torch.Tensor], torch.Tensor],
        said: str,
    ) -> None:
        folder = quantize(family(ROWS.get(name, "Qwen3Moe")), tmp_path / "model", name)
        change_weights(
            folder, lambda t: t.update({(n := next(n for n in t if n.endswith(end))): change(t[n])})
        )
        message = refusal(folder)
        assert str(folder / WEIGHTS) in message
        assert said in message


TOKENIZER = """
from transformers import PreTrainedTokenizer

class OddTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "odd.model"}
    def __init__(self, vocab_file, **more):
        self.pieces = open(vocab_file).read().split()
        super().__init__(**more)
    @property
    def vocab_size(self):
        return len(self.pieces)
    def get_vocab(self):
        return {piece: i for i, piece in enumerate(self.pieces)}
    def _tokenize(self, text):
        return list(text)
    def _convert_token_to_id(self, token):
        return self.pieces.index(token)
    def _convert_id_to_token(self, index):
        return self.pieces[index]
"""


class TestCodeOfTheCheckpointsOwn:
    @pytest.fixture
    def odd(self, family: Family, tmp_path: Path) -> Path:
        return make_odd(family("Llama"), tmp_path / "odd")

    def test_a_model_is_refused_without_the_flag(self, odd: Path) -> None:
        said = refusal(odd)
        for part in (str(odd), "OddForCausalLM", "'odd'", "odd.py", "--trust-remote-code"):
            assert part in said

    def test_a_model_is_trained_and_sampled_with_it(self, odd: Path) -> None:
        model = BaseModel("tests/odd", str(odd), CPU, torch.float32, trust_remote_code=True)
        check(model)
        assert (type(model.module).__name__, model.way) == ("OddForCausalLM", "packed")
        reference = AutoModelForCausalLM.from_pretrained(odd, trust_remote_code=True)
        ids = torch.tensor(tokens(12, 0))
        assert reference.model.norm.variance_epsilon == 3.0
        assert relative(model.plain(ids), reference.model(ids[None]).last_hidden_state[0].detach()) < 1e-5

    def test_code_that_cannot_run_is_named(self, odd: Path) -> None:
        (odd / "odd.py").write_text("import nothing_of_that_name")
        said = refusal(odd, trust_remote_code=True)
        assert str(odd) in said
        assert "nothing_of_that_name" in said

    def test_transformers_own_model_is_preferred(self, model: Path) -> None:
        """Kimi-Linear, DeepSeek and others bring code along that transformers has meanwhile."""
        (model / "old.py").write_text("raise RuntimeError")
        set_config(model, auto_map={"AutoConfig": "old.C", "AutoModelForCausalLM": "old.M"})
        assert type(loaded(model, trust_remote_code=True).module).__name__ == "Qwen3MoeForCausalLM"

    def test_a_tokenizer_is_refused_without_the_flag_and_loaded_with_it(self, model: Path) -> None:
        """Kimi's is of this kind: transformers would make another one of the same file."""
        (model / "tokenizer.json").unlink()
        (model / "odd.model").write_text("c b a")
        (model / "tokenization_odd.py").write_text(TOKENIZER)
        settings = {
            "tokenizer_class": "OddTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_odd.OddTokenizer", None]},
        }
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
        said = refusal(model)
        assert "tokenization_odd.py" in said
        assert "--trust-remote-code" in said
        tokenizer = loaded(model, trust_remote_code=True).tokenizer
        assert tokenizer("abc")["input_ids"] == [2, 1, 0]


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


class TestFoldersThatSomethingIsWrongWith:
    def test_no_folder(self, tmp_path: Path) -> None:
        assert f"there is no folder {tmp_path / 'absent'}" in refusal(tmp_path / "absent")
        assert "there is no folder ./absent" in refusal("./absent")

    def test_a_file(self, model: Path) -> None:
        assert f"{model / WEIGHTS} is a file" in refusal(model / WEIGHTS)

    @pytest.mark.parametrize(
        ("text", "cause"),
        [
            (None, "has no config.json"),
            ("{", "config.json is no valid JSON"),
            ("[1]", "config.json is no JSON object"),
            ("[" * 100_000, "config.json is no valid JSON"),
            ("\xff", "config.json is no valid"),
            ("{}", "config.json has no model_type"),
            ('{"model_type": 7}', "config.json has no model_type"),
            ('{"model_type": "tomorrow", "architectures": ["TomorrowForCausalLM"]}', "TomorrowForCausalLM"),
            (
                '{"model_type": "vit", "architectures": ["ViTModel"]}',
                "ViTModel is no language model",
            ),
            ('{"model_type": "qwen3", "hidden_size": "many"}', "config.json is no valid config"),
            ('{"model_type": "qwen3", "hidden_size": -8}', "config.json"),
            ('{"model_type": "qwen3", "num_hidden_layers": 2, "layer_types": ["a", "b"]}', "config.json"),
        ],
    )
    def test_a_config_that_is_none(self, model: Path, text: str | None, cause: str) -> None:
        (model / "config.json").unlink()
        if text is not None:
            (model / "config.json").write_text(text, encoding="latin-1")
        said = refusal(model)
        assert cause in said
        assert str(model) in said

    @pytest.mark.parametrize(
        "other", [None, "pytorch_model.bin", "model-q4.gguf", "consolidated.safetensors"]
    )
    def test_no_weights(self, model: Path, other: str | None) -> None:
        (model / WEIGHTS).unlink()
        if other:
            (model / other).write_bytes(b"x")
        said = refusal(model)
        assert f"{model} has no weights" in said
        assert other is None or other in said

    @pytest.mark.parametrize("size", [0, 5, 100, -1])
    def test_a_truncated_file(self, model: Path, size: int) -> None:
        cut(model / WEIGHTS, size)
        assert f"{model / WEIGHTS} is truncated" in refusal(model)

    @pytest.mark.parametrize(
        "header",
        [
            b"\0" * 40,
            b'{"a": 1}',
            b"[]",
            b"[" * 100_000,
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
            b' "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        ],
    )
    def test_a_corrupt_header(self, model: Path, header: bytes) -> None:
        (model / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
        assert f"{model / WEIGHTS} has a corrupt header" in refusal(model)

    def test_something_behind_the_end(self, model: Path) -> None:
        (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes() + b"x")
        assert f"{model / WEIGHTS} is corrupt" in refusal(model)

    def test_a_truncated_shard_is_named(self, model: Path) -> None:
        shard(model)
        cut(model / "model-00002-of-00003.safetensors", -1)
        assert f"{model}/model-00002-of-00003.safetensors is truncated" in refusal(model)

    def test_a_missing_shard_is_named(self, model: Path) -> None:
        shard(model)
        (model / "model-00002-of-00003.safetensors").unlink()
        assert f"{model} lacks model-00002-of-00003.safetensors" in refusal(model)

    @pytest.mark.parametrize("where", [[], {}, {"a": 7}, {"a": "../outside.safetensors"}])
    def test_an_index_that_is_none(self, model: Path, where: object) -> None:
        (model / WEIGHTS).rename(model / "../outside.safetensors")
        (model / INDEX).write_text(json.dumps({"weight_map": where}))
        assert str(model / INDEX) in refusal(model)

    def test_an_index_that_names_a_tensor_elsewhere(self, model: Path) -> None:
        shard(model)
        index = json.loads((model / INDEX).read_text())
        name = "model.norm.weight"
        index["weight_map"][name] = next(
            f for f in index["weight_map"].values() if f != index["weight_map"][name]
        )
        (model / INDEX).write_text(json.dumps(index))
        said = refusal(model)
        assert name in said
        assert str(model / INDEX) in said

    def test_a_weight_that_is_not_there_is_never_made_up(self, model: Path) -> None:
        change_weights(model, lambda t: t.pop("model.layers.1.self_attn.o_proj.weight"))
        said = refusal(model)
        assert str(model) in said
        assert "lack model.layers.1.self_attn.o_proj.weight" in said

    def test_an_expert_that_is_not_there(self, model: Path) -> None:
        change_weights(model, lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"))
        said = refusal(model)
        assert "model.layers.1.mlp.experts.gate_up_proj" in said
        assert "7 of " in said

    def test_a_whole_expert_that_is_not_there(self, model: Path) -> None:
        change_weights(model, lambda t: [t.pop(name) for name in list(t) if "1.mlp.experts.7." in name])
        assert "model.layers.1.mlp.experts" in refusal(model)

    @pytest.mark.parametrize(
        "name",
        [
            "model.norm.weight",
            "model.layers.0.mlp.gate.weight",
            "model.layers.1.mlp.experts.3.up_proj.weight",
        ],
    )
    def test_a_shape_that_the_config_does_not_have(self, model: Path, name: str) -> None:
        change_weights(model, lambda t: t.update({name: torch.zeros(5, *t[name].shape[1:])}))
        said = refusal(model)
        assert str(model / WEIGHTS) in said
        assert "5" in said

    def test_numbers_that_are_no_weights(self, model: Path) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        change_weights(model, lambda t: t.update({name: t[name].to(torch.int8)}))
        assert f"{model / WEIGHTS}: {name} is int8 without a scale" in refusal(model)

    @pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "lm_head", "model.embed_tokens"])
    def test_a_number_that_is_not_finite(self, model: Path, name: str) -> None:
        """One row of the unembedding is enough to spoil every logprob."""
        change_weights(model, lambda t: t[f"{name}.weight"][5, 7].fill_(torch.nan))
        assert f"{model / WEIGHTS}: {name}.weight has numbers that are not finite" in refusal(model)

    def test_more_experts_a_token_than_there_are(self, model: Path) -> None:
        set_config(model, num_experts_per_tok=99)
        with pytest.raises(ModelError, match=rf"{model}: .*num_experts_per_tok 99, of 8 experts"):
            BaseModel("tests/moe", str(model), CPU, torch.float32)

    def test_attention_that_cannot_be_replaced(self, model: Path) -> None:
        config = {"model_type": "gptj", "architectures": ["GPTJForCausalLM"], "n_embd": 64, "n_head": 4}
        (model / "config.json").write_text(json.dumps(config | {"n_layer": 2, "rotary_dim": 8}))
        assert "no GPTJForCausalLM can be built from it: it takes attention from a table" in refusal(model)

    def test_end_tokens_that_are_none(self, model: Path) -> None:
        (model / "generation_config.json").write_text('{"eos_token_id": ["x"]}')
        assert f"{model / 'generation_config.json'}: eos_token_id must be" in refusal(model)

    def test_what_else_lies_in_a_folder_does_not_matter(self, model: Path) -> None:
        before = fingerprint(model)
        (model / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
        (model / "original.safetensors").mkdir()
        assert fingerprint(model) == before

    def test_a_config_of_another_size(self, model: Path) -> None:
        set_config(model, hidden_size=96)
        assert "where config.json makes it [512, 96]" in refusal(model)

    @pytest.mark.parametrize("broken", [None, "tokenizer.json", "tokenizer_config.json"])
    def test_no_tokenizer(self, model: Path, broken: str | None) -> None:
        for file in model.glob("tokenizer*"):
            if broken is None:
                file.unlink()
            elif file.name == broken:
                file.write_text("{")
        said = refusal(model)
        assert "tokenizer" in said
        assert str(model) in said

    def test_more_than_there_is_room_for(self, model: Path) -> None:
        (model / WEIGHTS).unlink()  # the config alone says so
        with pytest.raises(ModelError, match=r"need \d+ bytes in float32, and 1000 are left"):
            load(str(model), CPU, torch.float32, room=1000)


MEASURE = """
import json, re, sys, torch
from pathlib import Path
from tinsmith.engine.model.base import BaseModel
from tinsmith.engine.model.loading import load

def resident(what):
    return 1024 * int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
small, large = sys.argv[1:]
load(small, torch.device("cpu"), torch.bfloat16)  # what is imported on the way does not count
Path("/proc/self/clear_refs").write_text("5")  # the peak so far does not, either
before = resident("VmRSS")
module = load(large, torch.device("cpu"), torch.bfloat16).module
weights = sum(p.numel() * p.element_size() for p in module.parameters())
print(json.dumps([weights, resident("VmHWM") - before]))
"""


@pytest.mark.parametrize("stored", ["fp32", "fp8"])
def test_loading_needs_little_more_memory_than_the_weights(
    family: Family, tmp_path: Path, stored: str
) -> None:
    """In bf16, from a file of twice and one of half that size; half of all weights are one tensor."""
    folder = Path(shutil.copytree(family("Qwen3Moe"), tmp_path / "large"))
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 1024, "vocab_size": 8192, "num_hidden_layers": 1}
    set_config(folder, num_experts=32, num_local_experts=32, **sizes)
    tensors = {name: x for name, x in load_file(folder / WEIGHTS).items() if "layers.1" not in name}
    for name, size in {
        "model.embed_tokens.weight": (8192, 1024),
        "lm_head.weight": (8192, 1024),
        "model.norm.weight": (1024,),
        "model.layers.0.input_layernorm.weight": (1024,),
        "model.layers.0.post_attention_layernorm.weight": (1024,),
        "model.layers.0.self_attn.q_proj.weight": (64, 1024),
        "model.layers.0.self_attn.k_proj.weight": (32, 1024),
        "model.layers.0.self_attn.v_proj.weight": (32, 1024),
        "model.layers.0.self_attn.o_proj.weight": (1024, 64),
        "model.layers.0.mlp.gate.weight": (32, 1024),
        **{
            f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight": (1024, 1024)
            for expert in range(32)
            for part in ("gate", "up", "down")
        },
    }.items():
        if stored == "fp8" and name.endswith("_proj.weight"):
            tensors[name] = torch.zeros(size, dtype=torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(-(-size[0] // 128), -(-size[1] // 128))
        else:
            tensors[name] = torch.zeros(size)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    if stored == "fp8":
        set_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    command = [sys.executable, "-c", MEASURE, str(family("Qwen3Moe")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    weights, peak = json.loads(done.stdout)
    assert weights > 200e6
    assert weights * 0.9 < peak < weights * 1.2
