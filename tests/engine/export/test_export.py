"""Exports of all sorts of bases, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.engine.export.trained import TEXTS, Trained, load_transformers, logprobs_of, make_trained
from tests.engine.tiny import make_tokenizer, relative
from tests.families import make
from tests.quantized import quantize
from tinsmith.engine import adapter_files
from tinsmith.engine.export import ExportError, export


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def llama(root: Path) -> Trained:
    return make_trained("Llama", root)


class TestMerged:
    def test_the_files_are_the_bases_but_for_what_was_trained(self, root: Path, tmp_path: Path) -> None:
        trained = make_trained("Llama", tmp_path, train_mlp=False)
        (trained.base / "README.md").write_text("the base's card")
        export(trained.adapter, trained.name, str(trained.base), "merged", tmp_path / "out")
        assert {f.name for f in (tmp_path / "out").iterdir()} == {
            f.name for f in trained.base.iterdir() if f.name != "README.md"
        }
        before, after = (load_file(x / "model.safetensors") for x in (trained.base, tmp_path / "out"))
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert before.keys() == after.keys()
        assert changed == {name for name in before if "self_attn" in name or "lm_head" in name}
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
            (trained.base / "config.json").read_text()
        )

    @pytest.mark.parametrize("row", ["Llama", "Qwen3Moe", "GptOss"])
    def test_a_bf16_base_stays_one_and_every_weight_is_rounded_once(self, row: str, tmp_path: Path) -> None:
        trained = make_trained(row, tmp_path)
        base = AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.bfloat16)
        base.save_pretrained(tmp_path / "bf16")
        make_tokenizer().save_pretrained(tmp_path / "bf16")
        _adopt(trained.adapter, tmp_path / "bf16", trained.name)
        export(trained.adapter, trained.name, str(tmp_path / "bf16"), "merged", tmp_path / "out")
        exact = tmp_path / "exact"
        base.float().save_pretrained(exact)
        make_tokenizer().save_pretrained(exact)
        _adopt(trained.adapter, exact, trained.name)
        export(trained.adapter, trained.name, str(exact), "merged", tmp_path / "fp32")
        rounded, full = (load_file(tmp_path / x / "model.safetensors") for x in ("out", "fp32"))
        assert {x.dtype for x in rounded.values()} == {torch.bfloat16}
        assert all(torch.equal(rounded[name], full[name].bfloat16()) for name in full)

    @pytest.mark.parametrize("row", ["Qwen3Moe", "Llama-tied", "NemotronH"])
    def test_a_base_in_many_files_becomes_one_in_many_files(self, row: str, tmp_path: Path) -> None:
        trained = make_trained(row, tmp_path)
        split = tmp_path / "split"
        load_transformers(trained.base).save_pretrained(split, max_shard_size="100KB")
        make_tokenizer().save_pretrained(split)
        _adopt(trained.adapter, split, trained.name)
        export(trained.adapter, trained.name, str(split), "merged", tmp_path / "out")
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        for file in set(index["weight_map"].values()):
            with safe_open(tmp_path / "out" / file, "pt") as f:
                assert {name for name, where in index["weight_map"].items() if where == file} == set(f.keys())
        trained.check(load_transformers(tmp_path / "out"))

    @pytest.mark.parametrize(
        ("row", "form"), [("DeepseekV3", "fp8"), ("Qwen3Moe", "int4"), ("GptOss", "mxfp4")]
    )
    def test_a_quantized_base_becomes_a_full_one(self, row: str, form: str, tmp_path: Path) -> None:
        folder = quantize(make(row, tmp_path), tmp_path / "quantized", form)
        trained = _trained_on(folder, tmp_path)
        remarks = export(trained.adapter, trained.name, str(folder), "merged", tmp_path / "out")
        assert any("these are bf16" in remark for remark in remarks)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert "quantization_config" not in config
        merged = load_transformers(tmp_path / "out")
        for ours, text in zip(trained.logprobs, TEXTS, strict=True):
            assert relative(ours, logprobs_of(merged, text)) < 3e-2

    def test_a_tied_unembedding_becomes_its_own(self, tmp_path: Path) -> None:
        trained = make_trained("Llama-tied", tmp_path)
        remarks = export(trained.adapter, trained.name, str(trained.base), "merged", tmp_path / "out")
        assert any("tied" in remark for remark in remarks)
        module = load_transformers(tmp_path / "out")
        assert module.get_input_embeddings().weight is not module.get_output_embeddings().weight
        base = load_file(trained.base / "model.safetensors")
        assert torch.equal(module.get_input_embeddings().weight, base["model.embed_tokens.weight"])


class TestVllm:
    def test_what_vllm_does_not_take_must_be_left_out_by_name(self, root: Path, tmp_path: Path) -> None:
        trained = make_trained("DeepseekV3", tmp_path)

        def run(name: str, **more: object) -> list[str]:
            base, out = str(trained.base), tmp_path / name
            return export(trained.adapter, trained.name, base, "vllm", out, **more)  # type: ignore[arg-type]

        with pytest.raises(ExportError, match=r"kv_b_proj: .*lm_head|lm_head: .*kv_b_proj") as refused:
            run("a")
        assert "--drop" in str(refused.value)
        with pytest.raises(ExportError, match="kv_b_proj: vLLM absorbs it"):
            run("a", drop=["lm_head"])
        remarks = run("a", drop=["lm_head", "kv_b_proj"])
        assert any("left out: kv_b_proj, lm_head" in remark for remark in remarks)
        modules = {n.split(".lora_")[0] for n in load_file(tmp_path / "a" / "adapter_model.safetensors")}
        assert not any(name.endswith(("lm_head", "kv_b_proj")) for name in modules)
        assert "base_model.model.model.layers.1.mlp.experts.7.down_proj" in modules
        with pytest.raises(ExportError, match=r"no module 'nonsense'; it has: .*q_a_proj"):
            run("b", drop=["nonsense"])
        with pytest.raises(ExportError, match="both drop and keep"):
            run("b", drop=["lm_head"], keep=["lm_head"])

    def test_a_tied_unembedding_cannot_be_kept(self, tmp_path: Path) -> None:
        trained = make_trained("Llama-tied", tmp_path)
        for keep in ([], ["lm_head"]):
            with pytest.raises(ExportError, match=r"lm_head.*tied to the embedding"):
                export(trained.adapter, trained.name, str(trained.base), "vllm", tmp_path / "out", keep=keep)
        assert not (tmp_path / "out").exists()


class TestRefused:
    def export(self, trained: Trained, out: Path, form: str = "peft", **more: str) -> None:
        export(
            Path(more.get("adapter", trained.adapter)),
            trained.name,
            more.get("base", str(trained.base)),
            form,
            out,
        )

    def test_a_format_that_there_is_not(self, llama: Trained, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match="'gguf' is not one of peft, vllm, merged"):
            self.export(llama, tmp_path / "out", "gguf")

    def test_a_folder_that_is_there_already(self, llama: Trained, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match="exists already"):
            self.export(llama, tmp_path)

    def test_a_base_that_is_not_there_or_no_model(self, llama: Trained, tmp_path: Path) -> None:
        for base, says in ((tmp_path / "none", "there is no folder"), (tmp_path, "no config.json")):
            with pytest.raises(ExportError, match=says):
                self.export(llama, tmp_path / "out", base=str(base))

    def test_another_base_of_the_same_shape(self, llama: Trained, tmp_path: Path) -> None:
        other = make("Llama", tmp_path)
        tensors = load_file(other / "model.safetensors")
        save_file({name: x + 1 for name, x in tensors.items()}, other / "model.safetensors")
        for form in ("peft", "vllm", "merged"):
            with pytest.raises(ExportError, match="made on another base model"):
                self.export(llama, tmp_path / "out", form, base=str(other))

    @pytest.mark.parametrize(
        ("break_", "says"),
        [
            (lambda f: (f / "adapter_model.safetensors").unlink(), "cannot be read"),
            (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
            (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 100), "cannot be read"),
            (lambda f: (f / "adapter_config.json").rename(f / "adapter_config.json.age"), "encrypted"),
        ],
        ids=["no weights", "no config", "no safetensors", "encrypted"],
    )
    def test_an_adapter_that_is_none(
        self, llama: Trained, tmp_path: Path, break_: Callable[[Path], object], says: str
    ) -> None:
        adapter_files.write(
            str(tmp_path / "a"), llama.run.model, llama.run.layout, llama.run.live,
            optimizer=False, gradients=False,
        )  # fmt: skip
        break_(tmp_path / "a")
        with pytest.raises(ExportError, match=says):
            self.export(llama, tmp_path / "out", adapter=str(tmp_path / "a"))

    @pytest.mark.parametrize("form", ["peft", "vllm", "merged"])
    def test_a_full_disk_leaves_nothing(
        self, llama: Trained, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ExportError, match="No space left on device"):
            self.export(llama, tmp_path / "out", form)
        assert list(tmp_path.iterdir()) == []


def _adopt(adapter: Path, base: Path, name: str) -> None:
    """Have an adapter be one of another base."""
    from tinsmith.engine.model.loading import fingerprint

    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    config["tinsmith"]["fingerprint"] = fingerprint(base)
    file.write_text(json.dumps(config))


def _trained_on(base: Path, root: Path) -> Trained:
    """An adapter of a base in a folder of any sort."""
    from tests.engine.test_training import train
    from tests.engine.tiny import load, logprobs, make_run, request

    run = make_run(load(base), rank=4)
    adapter = root / "adapter"
    adapter_files.write(str(adapter), run.model, run.layout, run.live, optimizer=False, gradients=False)
    out = train(run, request(TEXTS, forward_only=True))
    return Trained("", base, adapter, run, logprobs(out))
