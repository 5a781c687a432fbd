"""External weights: saved for use elsewhere, downloaded by signed URLs, plain and encrypted."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import pyrage
import pytest
import tinker
from safetensors.torch import load
from tinker import types

from tests.fake_hub import fake_hub
from tests.harness import KEY, MODEL, Server, datum, detail
from tinsmith.service.signing import Signer

FILES = {"adapter_config.json", "adapter_model.safetensors"}
SSH = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHsKLqeplhpW+uObz5dvMgjz1OxfM/XXUB+VHtZ6isGN alice@rust"


@pytest.fixture(scope="module")
def training(server: Server) -> Iterator[tinker.TrainingClient]:
    """A run with something learned."""
    with server.sdk() as client:
        training = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        training.forward_backward([datum(10)], "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        yield training


@pytest.fixture(scope="module")
def rest(server: Server) -> tinker.RestClient:
    return tinker.RestClient(base_url=server.url, api_key=KEY)


@pytest.fixture(scope="module")
def plain(training: tinker.TrainingClient) -> str:
    return training.save_weights_external("plain").result().path


def fetch_all(rest: tinker.RestClient, path: str) -> dict[str, bytes]:
    urls = rest.get_external_weights_urls(path).result().urls
    return {name: httpx.get(url).raise_for_status().content for name, url in urls.items()}


class TestSaving:
    def test_it_is_the_adapter_in_tinkers_format(self, rest: tinker.RestClient, plain: str) -> None:
        files = fetch_all(rest, plain)
        assert set(files) == FILES
        config = json.loads(files["adapter_config.json"])
        assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (MODEL, 4, 32.0)
        tensors = load(files["adapter_model.safetensors"])
        assert tensors["base_model.model.model.unembed_tokens.lora_A.weight"].shape == (4, 64)

    def test_it_is_listed_and_counted(
        self, rest: tinker.RestClient, training: tinker.TrainingClient, plain: str
    ) -> None:
        listed = rest.list_checkpoints(training.model_id).result().checkpoints
        (mine,) = [item for item in listed if item.tinker_path == plain]
        assert (mine.checkpoint_id, mine.checkpoint_type) == ("external_weights/plain", "external")
        assert mine.size_bytes == sum(map(len, fetch_all(rest, plain).values()))

    def test_encrypted_files_open_with_each_of_the_keys_and_hold_the_same(
        self, rest: tinker.RestClient, training: tinker.TrainingClient, plain: str
    ) -> None:
        identities = [pyrage.x25519.Identity.generate() for _ in range(2)]
        recipients = [*(str(identity.to_public()) for identity in identities), SSH]
        saved = training.save_weights_external("sealed", age_encryption_recipients=recipients).result().path
        files = fetch_all(rest, saved)
        assert set(files) == {f"{name}.age" for name in FILES}
        for identity in identities:
            opened = {n.removesuffix(".age"): pyrage.decrypt(x, [identity]) for n, x in files.items()}
            assert opened == fetch_all(rest, plain)
        with pytest.raises(pyrage.DecryptError):
            pyrage.decrypt(files["adapter_config.json.age"], [pyrage.x25519.Identity.generate()])

    @pytest.mark.parametrize(
        ("recipients", "says"),
        [
            (["age1nonsense"], r"age_encryption_recipients\[0\]: 'age1nonsense' is no age recipient"),
            ([SSH, "AGE-SECRET-KEY-1"], r"age_encryption_recipients\[1\]: 'AGE-SECRET-KEY-1'"),
            ([SSH] * 11, "has 11 entries; give 1 to 10"),
            ([], "has 0 entries"),
        ],
    )
    def test_wrong_recipients_fail_through_the_future_and_nothing_is_saved(
        self,
        rest: tinker.RestClient,
        training: tinker.TrainingClient,
        recipients: list[str],
        says: str,
    ) -> None:
        with pytest.raises(tinker.RequestFailedError, match=says):
            training.save_weights_external("wrong", age_encryption_recipients=recipients).result()
        listed = rest.list_checkpoints(training.model_id).result().checkpoints
        assert "external_weights/wrong" not in {item.checkpoint_id for item in listed}

    def test_a_name_is_taken_once_and_never_leaves_the_store(self, training: tinker.TrainingClient) -> None:
        training.save_weights_external("once").result()
        with pytest.raises(tinker.RequestFailedError, match="exists already"):
            training.save_weights_external("once").result()
        for name in ("../outside", "a/b", "..", ""):
            with pytest.raises(tinker.RequestFailedError, match="path"):
                training.save_weights_external(name).result()
        training.save_state("once").result()  # another kind, another place

    def test_a_run_goes_on_from_plain_ones_but_not_with_an_optimizer_they_do_not_have(
        self, server: Server, training: tinker.TrainingClient, plain: str
    ) -> None:
        sealed = training.save_weights_external("secret", age_encryption_recipients=[SSH]).result().path
        with server.sdk() as client:
            again = client.create_training_client_from_state(plain).result()
            ours, theirs = (
                client_.forward([datum(10)], "cross_entropy").result().metrics["loss:sum"]
                for client_ in (training, again)
            )
            assert ours == theirs
            sampler = client.create_sampling_client(model_path=plain).result()
            params = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
            ours, theirs = (
                each.sample(types.ModelInput.from_ints([1, 2, 3]), 1, params).result().sequences[0].tokens
                for each in (training.save_weights_and_get_sampling_client().result(), sampler)
            )
            assert ours == theirs
            with pytest.raises(tinker.RequestFailedError, match="no optimizer state"):
                client.create_training_client_from_state_with_optimizer(plain).result()
            with pytest.raises(tinker.RequestFailedError, match="encrypted to age recipients"):
                client.create_training_client_from_state(sealed).result()


class TestUrls:
    def test_they_are_absolute_need_no_key_and_say_when_they_end(
        self, server: Server, rest: tinker.RestClient, plain: str
    ) -> None:
        signed = rest.get_external_weights_urls(plain).result()
        assert set(signed.urls) == FILES
        assert all(url.startswith(f"{server.url}/api/v1/") for url in signed.urls.values())
        assert timedelta(minutes=50) < signed.expires - datetime.now(UTC) <= timedelta(hours=1)

    def test_a_proxy_or_a_setting_decides_what_the_server_is_called(
        self, server: Server, plain: str, make_server: Callable[..., Server]
    ) -> None:
        run, _, name = plain.removeprefix("tinker://").split("/")
        where = f"training_runs/{run}/checkpoints/external_weights/{name}/external_weights_urls"
        raw = server.raw()
        forwarded = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "tinker.example.org"}
        for url in raw.get(where, headers=forwarded).json()["urls"].values():
            assert url.startswith("https://tinker.example.org/api/v1/external_weights/")

    def test_part_of_a_file_can_be_had(self, rest: tinker.RestClient, plain: str) -> None:
        url = rest.get_external_weights_urls(plain).result().urls["adapter_model.safetensors"]
        whole = httpx.get(url).content
        part = httpx.get(url, headers={"Range": "bytes=100-199"})
        assert (part.status_code, part.content) == (206, whole[100:200])
        assert part.headers["content-range"] == f"bytes 100-199/{len(whole)}"
        beyond = httpx.get(url, headers={"Range": f"bytes={len(whole)}-"})
        assert beyond.status_code == 416
        head = httpx.head(url)
        assert (head.status_code, int(head.headers["content-length"])) == (200, len(whole))

    def test_what_was_not_signed_is_refused(self, rest: tinker.RestClient, plain: str) -> None:
        url = rest.get_external_weights_urls(plain).result().urls["adapter_config.json"]
        head, _, query = url.partition("?")
        later = query.replace("expires=", "expires=9")
        for wrong in (
            head,
            f"{head}?{later}",
            f"{head}?{query}0",
            f"{head.replace('adapter_config.json', 'adapter_model.safetensors')}?{query}",
            f"{head}?expires=x&signature=y",
            f"{head}?expires=-1&signature=",
            f"{head}?expires=%00&signature=%ff",
            url.replace("adapter_config.json", "..%2F..%2Ftinsmith.db"),
            url.replace("external_weights/", "external_weights/.."),
        ):
            answer = httpx.get(wrong)
            assert answer.status_code in (401, 403, 404), wrong
            assert detail(answer)

    def test_even_a_signed_name_must_be_one_of_the_files(self, server: Server, plain: str) -> None:
        url = tinker.RestClient(base_url=server.url, api_key=KEY)
        address = url.get_external_weights_urls(plain).result().urls["adapter_config.json"]
        checkpoint = address.split("/external_weights/")[1].split("/")[0]
        signer, soon = Signer(server.data / "url-signing.key"), int(time.time()) + 60
        for name in ("..", "optimizer.safetensors", ".", "\x00"):
            signature = signer.sign(f"GET {checkpoint}/{name}", soon)
            query = {"expires": soon, "signature": signature}
            where = f"{server.url}/api/v1/external_weights/{checkpoint}/%{ord(name[0]):02x}{name[1:]}"
            assert httpx.get(where, params=query).status_code in (401, 404)

    def test_they_end(self, server: Server, rest: tinker.RestClient, plain: str) -> None:
        url = rest.get_external_weights_urls(plain).result().urls["adapter_config.json"]
        checkpoint = url.split("/external_weights/")[1].split("/")[0]
        past = int(time.time()) - 1
        signature = Signer(server.data / "url-signing.key").sign(
            f"GET {checkpoint}/adapter_config.json", past
        )
        ended = httpx.get(url.partition("?")[0], params={"expires": past, "signature": signature})
        assert ended.status_code == 410
        assert "ask for new URLs" in detail(ended)

    def test_strangers_get_none_and_nor_does_another_kind_of_checkpoint(
        self, server: Server, training: tinker.TrainingClient, plain: str
    ) -> None:
        stranger = server.raw(server.new_key("an-outsider"))
        where = plain.removeprefix("tinker://").replace("/", "/checkpoints/", 1)
        answer = stranger.get(f"training_runs/{where}/external_weights_urls")
        assert answer.status_code == 404
        assert "there is no checkpoint" in detail(answer)
        state = training.save_state("a-state").result().path.removeprefix("tinker://")
        answer = server.raw().get(
            f"training_runs/{state.replace('/', '/checkpoints/', 1)}/external_weights_urls"
        )
        assert answer.status_code == 400
        assert "save_weights_external()" in detail(answer)

    def test_they_end_with_the_checkpoint(
        self, rest: tinker.RestClient, training: tinker.TrainingClient
    ) -> None:
        path = training.save_weights_external("gone").result().path
        urls = rest.get_external_weights_urls(path).result().urls
        rest.delete_checkpoint_from_tinker_path(path).result()
        assert {httpx.get(url).status_code for url in urls.values()} == {404}
        with pytest.raises(tinker.NotFoundError):
            rest.get_external_weights_urls(path).result()


def test_urls_last_over_a_restart_and_no_longer_than_the_checkpoint(
    make_server: Callable[..., Server],
) -> None:
    server = make_server("--public-url", "http://localhost/nowhere").start()
    with server.sdk() as client:
        training = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        path = training.save_weights_external("kept", ttl_seconds=3600).result().path
    rest = tinker.RestClient(base_url=server.url, api_key=KEY)
    signed = rest.get_external_weights_urls(path).result()
    assert all(url.startswith("http://localhost/nowhere/api/v1/") for url in signed.urls.values())
    here = [url.replace("http://localhost/nowhere", server.url) for url in signed.urls.values()]
    server.stop()
    server.start()
    assert {httpx.get(url).status_code for url in here} == {200}
    server.expire_checkpoints()
    assert {httpx.get(url).status_code for url in here} == {404}
    assert (server.data / "url-signing.key").stat().st_mode & 0o077 == 0


class TestPrograms:
    """The official programs, as their users run them."""

    def tinker(self, server: Server, *arguments: str, **more: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "tinker.cli", "--format", "json", *arguments],
            env={**os.environ, "TINKER_BASE_URL": server.url, "TINKER_API_KEY": KEY, **more},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def test_the_cli_downloads_external_weights_and_training_checkpoints(
        self,
        server: Server,
        rest: tinker.RestClient,
        training: tinker.TrainingClient,
        plain: str,
        tmp_path: Path,
    ) -> None:
        state = training.save_state("to-download").result().path
        expected = fetch_all(rest, plain)
        for path in (plain, state):
            told = self.tinker(server, "checkpoint", "download", path, "--output", str(tmp_path))
            folder = Path(told["destination"])
            assert {file.name: file.read_bytes() for file in folder.iterdir()} == expected
        everything = rest.list_user_checkpoints(limit=1000).result().checkpoints
        assert not [item for item in everything if item.checkpoint_id == "external_weights/download"]

    def test_the_cli_pushes_to_a_hub(
        self, server: Server, rest: tinker.RestClient, plain: str, tmp_path: Path
    ) -> None:
        with fake_hub() as hub:
            self.tinker(
                server,
                *("checkpoint", "push-hf", plain, "--repo", "somebody/adapter"),
                HF_ENDPOINT=hub.url,
                HF_TOKEN="hf_test",
                HF_HOME=str(tmp_path),
                HF_HUB_OFFLINE="0",
                HF_HUB_DISABLE_XET="1",
            )
        assert hub.repos[0]["name"] == "adapter"
        assert {name: hub.files[name] for name in FILES} == fetch_all(rest, plain)
        card = hub.files["README.md"].decode()
        assert f"base_model: {MODEL}" in card
        assert "attn=True, mlp=True, unembed=True" in card

    def test_the_cookbook_downloads_through_an_encrypted_export(
        self,
        server: Server,
        rest: tinker.RestClient,
        training: tinker.TrainingClient,
        plain: str,
        tmp_path: Path,
    ) -> None:
        weights = pytest.importorskip("tinker_cookbook.weights")
        state = training.save_state("for-the-cookbook").result().path
        os.environ["TINKER_API_KEY"] = KEY
        try:
            weights.download(tinker_path=state, output_dir=str(tmp_path / "a"), base_url=server.url)
        finally:
            del os.environ["TINKER_API_KEY"]
        files = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
        assert files == fetch_all(rest, plain)


class TestArchives:
    """What SDKs before 0.34 download: a tar of any checkpoint's adapter, where a redirect says."""

    @pytest.fixture
    def weights(self, training: tinker.TrainingClient) -> str:
        name = f"archived-{time.monotonic_ns()}"
        return training.save_weights_for_sampler(name).result().path

    def ask(self, server: Server, path: str, key: str = KEY) -> httpx.Response:
        run, _, checkpoint = path.removeprefix("tinker://").partition("/")
        return server.raw(key).get(f"training_runs/{run}/checkpoints/{checkpoint}/archive")

    def test_it_has_the_adapter_and_a_sign_that_it_is_whole(
        self, server: Server, rest: tinker.RestClient, weights: str, plain: str
    ) -> None:
        answer = self.ask(server, weights)
        assert answer.status_code == 302
        end = parsedate_to_datetime(answer.headers["Expires"])
        assert timedelta(minutes=50) < end - datetime.now(UTC) < timedelta(minutes=70)
        whole = httpx.get(answer.headers["Location"]).raise_for_status()
        assert len(whole.content) == int(whole.headers["Content-Length"])
        with tarfile.open(fileobj=io.BytesIO(whole.content)) as tar:
            files = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
        assert files.pop("checkpoint_complete") == b""
        assert files == fetch_all(rest, plain)

    def test_a_states_archive_leaves_its_optimizer_out(
        self, server: Server, training: tinker.TrainingClient
    ) -> None:
        saved = training.save_state("archived").result().path
        whole = httpx.get(self.ask(server, saved).headers["Location"]).content
        with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
            assert set(tar.getnames()) == {*FILES, "checkpoint_complete"}

    def test_who_may_not_have_it(self, server: Server, rest: tinker.RestClient, weights: str) -> None:
        url = self.ask(server, weights).headers["Location"]
        assert httpx.get(url.replace("signature=", "signature=0")).status_code == 403
        assert httpx.get(url.partition("?")[0]).status_code == 403
        assert self.ask(server, f"{weights}-not").status_code == 404
        assert self.ask(server, weights.replace("sampler_weights/", "")).status_code == 400
        rest.delete_checkpoint_from_tinker_path(weights).result()
        assert httpx.get(url).status_code == 404
        assert self.ask(server, weights).status_code == 404
