"""What a config alone says about a model, against loaded models and the sizes of published ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.tiny import load, make_vision_model
from tests.families import FAMILIES, make
from tests.published import PUBLISHED, write
from tinsmith.engine.commands import LoraSpec
from tinsmith.engine.model.base import ModelError
from tinsmith.engine.model.checks import check
from tinsmith.engine.model.describe import Description, describe
from tinsmith.engine.model.lora import Layout
from tinsmith.engine.states import state_bytes


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("families")
    return lambda row: make(row, root)


def described(folder: Path, **more: int) -> Description:
    return describe("org/name", str(folder), "cpu", "fp32", **more)


@pytest.mark.parametrize("row", FAMILIES)
def test_a_config_says_what_the_loaded_model_is(family: Callable[[str], Path], row: str) -> None:
    model = load(family(row))
    check(model)
    found = described(family(row), rank=4)
    layers = model.attention_layers.values()
    assert found.architecture == type(model.module).__name__
    assert found.parameters == model.parameters
    assert found.weights_bytes == model.nbytes
    assert found.adapter_parameters == Layout(model.slots, LoraSpec(rank=4, seed=0)).size
    assert found.cache_bytes_per_1k_tokens == 4000 * sum(
        s.kv_heads * (s.key_dim + s.value_dim) for s in layers
    )
    assert found.state_bytes_per_sequence == state_bytes(model)
    assert (found.max_context, found.way, found.images) == (model.max_context, model.way, False)
    assert found.fits


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_sizes(tmp_path: Path, name: str) -> None:
    expected = PUBLISHED[name]
    found = describe(name, str(write(name, tmp_path)), "cpu", "bf16")
    active = found.active_parameters - (0 if expected.counts_embedding else found.embedding_parameters)
    assert found.parameters / 1e9 == pytest.approx(expected.total, rel=0.01)
    assert active / 1e9 == pytest.approx(expected.active, rel=0.05)
    assert found.weights_bytes == pytest.approx(2 * found.parameters, rel=1e-4)  # a few stay in fp32
    assert bool(found.quantized) == ("quantization_config" in expected.config)
    assert found.images == ("vision_config" in expected.config)
    assert (found.state_bytes_per_sequence > 0) == (found.way == "packed, recurrent")


def test_keys_and_values_of_grouped_heads(tmp_path: Path) -> None:
    """Qwen3-8B: 36 layers of 8 heads of 128, keys and values, 2 bytes each."""
    found = describe("q", str(write("Qwen3-8B", tmp_path)), "cpu", "bf16")
    assert found.cache_bytes_per_1k_tokens == 1000 * 36 * 8 * 128 * 2 * 2


def test_a_tower_is_seen(tmp_path: Path) -> None:
    assert described(make_vision_model("Qwen3VL", tmp_path)).images


def test_what_does_not_fit(family: Callable[[str], Path], tmp_path: Path) -> None:
    folder, large = family("Qwen3"), str(write("Llama-3.1-8B", tmp_path))
    assert "base weights need" in described(folder, memory=1000).why_not
    assert "a run of rank 100000 needs" in described(folder, memory=1 << 30, rank=100_000).why_not
    memory = 2 * 8_030_261_248 + (600 << 20)
    assert "a pass needs" in describe("l", large, "cpu", "bf16", memory=memory, rank=1).why_not
    assert not described(folder, memory=1000).fits


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "tomorrow"}', '{"model_type": "vit"}'])
def test_a_config_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=f"org/name: {tmp_path}"):
        described(tmp_path)


def test_a_trillion_parameters_need_no_memory_to_be_looked_at(tmp_path: Path) -> None:
    folder = write("Kimi-K2-Thinking", tmp_path)
    code = """
import json, re, sys
from pathlib import Path
from tinsmith.cli import main
code = main(["models", "check", sys.argv[1], "--json", "--memory", "1GB", "--device", "cpu"])
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())
print(json.dumps([code, int(peak[1])]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    page, code_and_peak = done.stdout.rstrip().rsplit("\n", 1)
    said = json.loads(page)
    code_, kilobytes = json.loads(code_and_peak)
    assert said["parameters"] > 1e12
    assert not said["fits"]
    assert code_ == 1
    assert kilobytes < 1 << 20
