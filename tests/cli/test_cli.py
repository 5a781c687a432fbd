"""The command line."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import shutil
import socket
from pathlib import Path

import httpx
import pytest

from tests.families import make, make_odd
from tests.harness import MODEL, Server, datum, free_port, wait_for
from tinsmith.cli import main
from tinsmith.cli.serve import _listen
from tinsmith.settings import Settings


def test_keys_are_made_listed_and_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(tmp_path)]
    assert main(["keys", "create", "ann", *data]) == 0
    key = capsys.readouterr().out.strip()
    assert re.fullmatch(r"tml-[\w-]{43}", key)
    assert main(["keys", "create", "bob", "--admin", *data]) == 0
    capsys.readouterr()
    main(["keys", "list", *data])
    listing = capsys.readouterr().out
    assert "ann" in listing
    assert key not in listing
    assert main(["keys", "revoke", key, *data]) == 0
    assert main(["keys", "revoke", "ann", *data]) == 1
    capsys.readouterr()
    main(["keys", "list", *data])
    assert re.search(r"ann .*revoked", capsys.readouterr().out)


def test_a_key_is_not_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["keys", "create", "ann", "--data", str(tmp_path)])
    key = capsys.readouterr().out.strip().encode()
    assert not any(key in file.read_bytes() for file in tmp_path.iterdir())


def test_a_wrong_setting_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "x"]) == 2
    assert capsys.readouterr().err == "tinsmith: port: must be a number, not 'x'\n"


def test_answers_do_not_wait_for_acknowledgements() -> None:
    """Nagle's algorithm is off for the connections that are accepted."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(
                writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            )
            writer.close()

        listener = _listen(dataclasses.replace(Settings(), port=free_port()))
        async with await asyncio.start_server(accept, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            value = await found
            writer.close()
        return value

    assert asyncio.run(accepted())


def test_a_models_folder_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "path", "a/b", "--model", f"a/b={tmp_path}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"


def test_the_first_start_prints_a_key_once_and_where_things_are(tiny_model: Path, tmp_path: Path) -> None:
    server = Server(tiny_model, tmp_path / "data", "--root-path", "/below")
    server.environment["TINSMITH_BOOTSTRAP_API_KEY"] = ""
    server.start()
    try:
        wait_for(lambda: "API key" in server.log(), what="the server to say where things are")
        (key,) = re.findall(r"API key +(tml-\S+)", server.log())
        for part in (server.url, "tests/tiny", "device    cpu", str(tmp_path / "data")):
            assert part in server.log()
        assert server.raw(key).get("status").status_code == 200
        for prefix in ("", "/below"):
            assert httpx.get(f"{server.url}{prefix}/api/v1/healthz").status_code == 200
    finally:
        server.end()


def test_a_model_that_is_none_ends_the_server_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    server = Server(tmp_path / "empty", tmp_path / "data").start(wait=False)
    assert server.process is not None
    assert server.process.wait(60) == 1
    assert "the engine did not start" in server.log()


def test_weights_that_are_cut_off_are_said_before_the_server_is_ready(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "cut"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    server = Server(folder, tmp_path / "data").start(wait=False)
    assert server.process is not None
    assert server.process.wait(60) == 1
    assert f"the engine did not start: tests/tiny: {file} is truncated" in server.log()
    assert "Traceback" not in server.log()


def test_code_that_a_checkpoint_brings_along_runs_if_it_may(tmp_path: Path) -> None:
    folder = make_odd(make("Llama", tmp_path), tmp_path / "odd")
    refused = Server(folder, tmp_path / "data").start(wait=False)
    assert refused.process is not None
    assert refused.process.wait(60) == 1
    assert "It runs only with --trust-remote-code" in refused.log()
    server = Server(folder, tmp_path / "data", "--trust-remote-code").start()
    try:
        with server.sdk() as client:
            training = client.create_lora_training_client(MODEL, rank=4).result()
            assert training.forward([datum()], "cross_entropy").result().metrics["loss:sum"] > 0
    finally:
        server.end()


class TestModelsCheck:
    def test_a_page(self, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["models", "check", str(tiny_model), "--dtype", "fp32", "--memory", "1GB"]) == 0
        page = capsys.readouterr().out
        for line in (
            r"architecture +Qwen3ForCausalLM",
            r"parameters +0.14 M, 0.14 M active per token \(0.11 M beside the embedding\)",
            r"weights +558.6 kB in fp32",
            r"adapter +\S+ M parameters at rank 32: \S+ MB with gradient and moments, \S+ kB as a sampler",
            r"cache +512.0 kB per 1,000 tokens\n",
            r"context +512 tokens",
            r"path +packed training, paged cache",
            r"images +no",
            r"fits +yes: 1.1 GB to plan with on cpu",
        ):
            assert re.search(line, page), (line, page)

    def test_json_and_a_model_of_the_settings(
        self, tiny_model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ["--json", "--rank", "8", "--model", f"org/tiny={tiny_model}", "--memory", "1000"]
        assert main(["model", "check", "org/tiny", *flags]) == 1
        said = json.loads(capsys.readouterr().out)
        assert (said["name"], said["rank"], said["fits"]) == ("org/tiny", 8, False)
        assert "1000" in said["why_not"]

    def test_errors_name_what_they_are_about(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for arguments, code, said in (
            ([str(tmp_path)], 1, f"{tmp_path} has no config.json"),
            (["nowhere"], 2, "there is no folder 'nowhere'"),
            ([str(tmp_path), "--rank", "0"], 2, "rank: must be at least 1"),
            ([str(tmp_path), "--memory", "much"], 2, "'much' is no number of bytes"),
        ):
            assert main(["models", "check", *arguments]) == code
            captured = capsys.readouterr()
            assert said in captured.err
            assert captured.err.count("\n") == 1
            assert not captured.out
