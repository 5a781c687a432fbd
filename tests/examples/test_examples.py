"""The examples, shortened, against a server with the model that ships; and the model itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import KEY, Server, exit_code

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "src" / "tinsmith" / "assets" / "models" / "tin-5m"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`tinsmith serve` as a user starts it: no --model."""
    server = Server(SHIPPED, tmp_path_factory.mktemp("shipped") / "data", "--dtype", "auto")
    server.models = {}
    yield server.start()
    server.end()


def run(server: Server, name: str, folder: Path, *options: str) -> tuple[str, list[dict[str, float]]]:
    """Run an example from an empty folder, as somebody would who has copied it."""
    log = folder / "log.jsonl"
    command = [sys.executable, str(ROOT / "examples" / name), *options]
    environment = {**os.environ, "TINKER_BASE_URL": server.url, "TINKER_API_KEY": KEY, "HF_HUB_OFFLINE": "1"}
    if "--steps" in options:
        command += ["--log", str(log)]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
    assert exit_code(done) == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return done.stdout, rows


def test_supervised_training_teaches_the_task(shipped: Server, tmp_path: Path) -> None:
    out, rows = run(shipped, "sft.py", tmp_path, "--steps", "20", "--held-out", "16")
    assert rows[0]["held_out_accuracy"] == 0
    assert rows[-1]["held_out_loss"] < rows[0]["held_out_loss"] / 3
    assert "saved as tinker://" in out


def test_reinforcement_learning_samples_rewards_and_steps(shipped: Server, tmp_path: Path) -> None:
    options = ["--steps", "2", "--problems", "4", "--group", "4", "--held-out", "16"]
    _, rows = run(shipped, "rl.py", tmp_path, *options)
    assert [row["step"] for row in rows] == [1, 2, 2]
    assert 0.1 < rows[-1]["held_out_before"] < 0.6


def test_the_shortest_script_runs(shipped: Server, tmp_path: Path) -> None:
    out, _ = run(shipped, "hello.py", tmp_path)
    losses = [float(line.split()[1]) for line in out.splitlines() if line[:1].isdigit()]
    assert losses[-1] < losses[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize(("script", "least"), [("hundred_calls.py", 100), ("further_calls.py", 35)])
def test_calls_do_as_documented(shipped: Server, tmp_path: Path, script: str, least: int) -> None:
    name = "tinsmith/tin-5m"  # under which a SamplingClient looks for its tokenizer
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).symlink_to(SHIPPED)
    out, _ = run(shipped, script, tmp_path)
    assert int(out.splitlines()[-1].split()[0]) >= least
    text = (ROOT / "examples" / script).read_text()
    assert "tinsmith" not in text.lower()


@pytest.mark.parametrize("name", ["sft.py", "rl.py", "hello.py"])
def test_an_example_is_short_and_needs_the_sdk_alone(name: str) -> None:
    text = (ROOT / "examples" / name).read_text()
    assert len(text.splitlines()) < 120
    assert "tinsmith." not in text.replace("tinsmith/", "")


class TestShippedModel:
    def test_it_is_small_untied_and_complete(self) -> None:
        from safetensors import safe_open

        config = json.loads((SHIPPED / "config.json").read_text())
        assert config["architectures"] == ["Qwen3ForCausalLM"]
        assert config["tie_word_embeddings"] is False
        assert (SHIPPED / "model.safetensors").stat().st_size < 16 << 20
        with safe_open(SHIPPED / "model.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert {str(t.dtype) for t in tensors.values()} == {"torch.bfloat16"}
        assert 2e6 < sum(t.numel() for t in tensors.values()) < 6e6

    def test_its_tokenizer_speaks_the_qwen_chat_format(self) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
        for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"):
            assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
        text = "Grüße, 東京! 12+34\n\t🙂"
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
        )
        assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
