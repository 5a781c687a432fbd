"""tinsmith checkpoints: on a server's data folder, whether it runs or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tinker import types
from transformers import AutoModelForCausalLM

from tests.engine.export.trained import logprobs_of
from tests.engine.tiny import relative
from tests.harness import MODEL, Server, datum
from tinsmith.cli import main

TOKENS = [5, 6, 7, 8, 9, 10]


@pytest.fixture(scope="module")
def trained(server: Server) -> Iterator[tuple[str, list[float]]]:
    """A checkpoint's path, and the logprobs of TOKENS[1:] with it."""
    with server.sdk() as client:
        training = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        for _ in range(3):
            training.forward_backward([datum(10)], "cross_entropy").result()
            training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        sampler = training.save_weights_and_get_sampling_client().result()
        known = sampler.compute_logprobs(types.ModelInput.from_ints(TOKENS)).result()
        yield training.save_state("exported").result().path, known[1:]


@pytest.fixture
def export(server: Server, tiny_model: Path) -> Callable[..., int]:
    def run(*arguments: str, model: str | None = f"{MODEL}={tiny_model}") -> int:
        named = ["--model", model] if model else []
        return main(["checkpoints", "export", *arguments, "--data", str(server.data), *named])

    return run


def test_a_checkpoint_of_a_running_server_becomes_an_adapter_and_a_model(
    trained: tuple[str, list[float]],
    export: Callable[..., int],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, expected = trained
    for form in ("peft", "vllm", "merged"):
        assert export(path, "--format", form, "--out", str(tmp_path / form)) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / form)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for module in (PeftModel.from_pretrained(base, tmp_path / "peft"), merged):
        assert relative(torch.tensor(expected), logprobs_of(module, TOKENS)) < 1e-5


def test_a_folder_of_the_data_folder_will_do_as_well(
    server: Server, trained: tuple[str, list[float]], export: Callable[..., int], tmp_path: Path
) -> None:
    newest = max((server.data / "blobs" / "checkpoints").iterdir(), key=lambda folder: folder.stat().st_mtime)
    assert export(str(newest), "--format", "peft", "--out", str(tmp_path / "out")) == 0
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize(
    ("path", "more", "says"),
    [
        ("tinker://nobody:train:0/weights/x", [], "there is no checkpoint tinker://nobody:train:0/weights/x"),
        ("tinker://a/b", [], "PATH: must look like tinker://"),
        ("nowhere", [], "no adapter's folder"),
        (None, ["--format", "gguf"], "format: 'gguf' is not one of peft, vllm, merged"),
        (None, ["--drop", "lm_head"], "drop and keep are for the format vllm"),
        (None, ["--out", "."], "exists already"),
        (None, ["--data", "/nonexistent"], "/nonexistent/tinsmith.db does not exist"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    trained: tuple[str, list[float]],
    export: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    path: str | None,
    more: list[str],
    says: str,
) -> None:
    arguments = ["--format", "peft", "--out", str(tmp_path / "out"), *more]
    # The last of two flags counts, and export() gives --data at the end.
    if "--data" in more:
        assert main(["checkpoints", "export", trained[0], *arguments]) == 1
    else:
        assert export(path or trained[0], *arguments) == 1
    told = capsys.readouterr().err
    assert says in told
    assert told.startswith("tinsmith: ")
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_base_model_that_is_elsewhere_must_be_named(
    trained: tuple[str, list[float]],
    export: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", _offline)
    assert export(trained[0], "--format", "peft", "--out", str(tmp_path / "out"), model=None) == 1
    assert f"--model {MODEL}=PATH" in capsys.readouterr().err


def _offline(*_: object, **__: object) -> None:
    raise OSError("offline")
