"""Weights that come from elsewhere, as SDK 0.39 sends them: started, PUT file by file, finished."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import tinker
import torch
from safetensors.torch import load, save
from tinker import types

from tests.harness import KEY, MODEL, Raw, Server, datum, detail
from tinsmith.service.signing import Signer

LORA = {"rank": 4, "seed": 1}
PROMPT = types.ModelInput.from_ints([1, 2, 3, 4])
Files = dict[str, bytes]
LAYER = "base_model.model.model.layers.0."
UP = f"{LAYER}mlp.up_proj.lora_A.weight"


@pytest.fixture(scope="module")
def training(server: Server) -> Iterator[tinker.TrainingClient]:
    with server.sdk() as client:
        training = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        training.forward_backward([datum(10)], "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        yield training


@pytest.fixture(scope="module")
def files(server: Server, training: tinker.TrainingClient) -> Files:
    """What save_weights_external() wrote."""
    rest = tinker.RestClient(base_url=server.url, api_key=KEY)
    path = training.save_weights_external("for-upload").result().path
    urls = rest.get_external_weights_urls(path).result().urls
    return {name: httpx.get(url).content for name, url in urls.items()}


def start(raw: Raw, **more: object) -> dict[str, Any]:
    return raw.ok("external_weights_upload_start", {"base_model": MODEL, "lora_config": LORA, **more})


def upload(raw: Raw, files: Files, **more: object) -> httpx.Response:
    """The answer to the last call."""
    started = start(raw, **more)
    for name, content in files.items():
        assert httpx.put(started["urls"][name], content=content).status_code == 200
    return raw.post("external_weights_upload_finish", {"upload_id": started["upload_id"]})


def changed(files: Files, change: Callable[[dict[str, torch.Tensor]], object]) -> Files:
    tensors = load(files["adapter_model.safetensors"])
    change(tensors)
    return {**files, "adapter_model.safetensors": save(tensors)}


def configured(files: Files, **settings: object) -> Files:
    config = {**json.loads(files["adapter_config.json"]), **settings}
    return {**files, "adapter_config.json": json.dumps(config).encode()}


class TestUploading:
    def test_what_was_exported_comes_back_and_is_the_same(
        self, server: Server, raw: Raw, training: tinker.TrainingClient, files: Files
    ) -> None:
        started = start(raw)
        assert set(started["urls"]) == {"adapter_config.json", "adapter_model.safetensors"}
        assert all(url.startswith(f"{server.url}/api/v1/") for url in started["urls"].values())
        path = upload(raw, files).json()["tinker_path"]
        parsed = types.ParsedCheckpointTinkerPath.from_tinker_path(path)
        assert parsed.checkpoint_type == "external"
        params = types.SamplingParams(max_tokens=5, temperature=0.0, stop=[])
        with server.sdk() as client:
            again = client.create_training_client_from_state(path).result()
            sampler = client.create_sampling_client(model_path=path).result()
            losses = [
                each.forward([datum(10)], "cross_entropy").result().metrics["loss:sum"]
                for each in (training, again)
            ]
            assert losses[0] == losses[1]
            drawn = [
                each.sample(PROMPT, 1, params).result().sequences[0].tokens
                for each in (training.save_weights_and_get_sampling_client().result(), sampler)
            ]
            assert drawn[0] == drawn[1]
            again.forward_backward([datum(10)], "cross_entropy").result()
            again.optim_step(types.AdamParams()).result()

    def test_it_is_listed_downloaded_and_deleted_like_any_other(
        self, server: Server, raw: Raw, files: Files
    ) -> None:
        rest = tinker.RestClient(base_url=server.url, api_key=KEY)
        path = upload(raw, files).json()["tinker_path"]
        run = path.removeprefix("tinker://").split("/")[0]
        assert rest.get_training_run(run).result().base_model == MODEL
        assert not rest.get_training_run(run).result().corrupted
        (item,) = rest.list_checkpoints(run).result().checkpoints
        urls = rest.get_external_weights_urls(item.tinker_path).result().urls
        tensors = load(httpx.get(urls["adapter_model.safetensors"]).content)
        expected = load(files["adapter_model.safetensors"])
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        rest.delete_checkpoint_from_tinker_path(path).result()
        assert rest.list_checkpoints(run).result().checkpoints == []

    def test_another_precision_alpha_and_the_hosted_services_names_are_taken(
        self, server: Server, raw: Raw, files: Files
    ) -> None:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            for name in list(tensors):
                tensors[name.replace("model.unembed_tokens", "lm_head")] = tensors.pop(name).bfloat16()
            tensors[f"{LAYER}mlp.experts.w3.lora_A.weight"] = torch.zeros(0, 4, 0)  # a part that there is not

        config = json.dumps({"r": 4, "lora_alpha": 64, "peft_type": "LORA"}).encode()
        path = upload(raw, {**changed(files, change), "adapter_config.json": config}).json()["tinker_path"]
        with server.sdk() as client:
            client.create_training_client_from_state(path).result()

    def test_finishing_again_answers_the_same(self, raw: Raw, files: Files) -> None:
        started = start(raw)
        for name, content in files.items():
            httpx.put(started["urls"][name], content=b"not this")
            httpx.put(started["urls"][name], content=content)  # the last one counts
        body = {"upload_id": started["upload_id"]}
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: raw.ok("external_weights_upload_finish", body), range(4)))
        assert len({answer["tinker_path"] for answer in answers}) == 1
        assert httpx.put(started["urls"]["adapter_config.json"], content=b"{}").status_code == 400

    def test_it_can_be_tried_again_after_a_refusal(self, raw: Raw, files: Files) -> None:
        started = start(raw)
        for name, content in configured(files, r=8).items():
            httpx.put(started["urls"][name], content=content)
        body = {"upload_id": started["upload_id"]}
        assert raw.post("external_weights_upload_finish", body).status_code == 400
        httpx.put(started["urls"]["adapter_config.json"], content=files["adapter_config.json"])
        assert raw.ok("external_weights_upload_finish", body)["tinker_path"]


class TestRefused:
    @pytest.mark.parametrize(
        ("more", "status", "says"),
        [
            ({"base_model": "no/such"}, 404, "base_model: 'no/such' is not served here"),
            ({"base_model": None}, 400, "base_model: is missing"),
            ({"lora_config": None}, 400, "lora_config"),
            ({"lora_config": {"rank": 0}}, 400, "lora_config.rank"),
            ({"lora_config": {"rank": 100000}}, 400, "lora_config.rank"),
            ({"destination_project_id": "nowhere"}, 404, "destination_project_id: there is no project"),
        ],
    )
    def test_what_cannot_be_started(self, raw: Raw, more: dict[str, object], status: int, says: str) -> None:
        body = {"base_model": MODEL, "lora_config": LORA, **more}
        answer = raw.post("external_weights_upload_start", body)
        assert (answer.status_code, says in detail(answer)) == (status, True), answer.text

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda f: {**f, "adapter_config.json": b"{"}, "adapter_config.json is no JSON"),
            (lambda f: {**f, "adapter_config.json": b"[]"}, "no JSON object"),
            (lambda f: {**f, "adapter_config.json": b"\xff\xfe"}, "no JSON"),
            (lambda f: configured(f, r=8), "r is 8, and lora_config.rank was 4"),
            (lambda f: configured(f, lora_alpha="many"), "lora_alpha must be a number"),
            (lambda f: configured(f, use_dora=True), "use_dora is set"),
            (lambda f: configured(f, alpha_pattern={"q_proj": 8}), "alpha_pattern is set"),
            (lambda f: configured(f, bias="all"), "bias is 'all'; only plain LoRA adapters are taken, whose"),
            (lambda f: configured(f, init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
            (lambda f: configured(f, peft_type="LOHA"), "peft_type is 'LOHA'"),
            (lambda f: configured(f, tinsmith={"fingerprint": "0" * 32}), "another base model"),
            (lambda f: {**f, "adapter_model.safetensors": b"x" * 1000}, "no safetensors file"),
            (lambda f: {**f, "adapter_model.safetensors": b""}, "no safetensors file"),
            (
                lambda f: {**f, "adapter_model.safetensors": f["adapter_model.safetensors"][:-10]},
                "no safetensors file",
            ),
            (
                lambda f: changed(f, lambda t: t.pop(UP)),
                "lacks base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
            ),
            (
                lambda f: changed(f, lambda t: t.update({"base_model.model.evil.weight": torch.ones(1)})),
                "has base_model.model.evil.weight, which",
            ),
            (
                lambda f: changed(
                    f, lambda t: t.update({f"{LAYER}mlp.up_proj.lora_A.weight": torch.ones(64, 4)})
                ),
                "has the shape [64, 4], not [4, 64]",
            ),
            (
                lambda f: changed(f, lambda t: t[UP].fill_(float("nan"))),
                "values that are not finite",
            ),
            (
                lambda f: changed(
                    f,
                    lambda t: t.update(
                        {f"{LAYER}mlp.up_proj.lora_A.weight": torch.ones(4, 64, dtype=torch.int64)}
                    ),
                ),
                "is I64; weights are F32, BF16 or F16",
            ),
        ],
    )
    def test_files_that_do_not_suit(
        self, raw: Raw, files: Files, change: Callable[[Files], Files], says: str
    ) -> None:
        answer = upload(raw, change(files))
        assert answer.status_code == 400
        assert says in detail(answer)

    def test_an_adapter_of_other_parts_does_not_suit(self, raw: Raw, files: Files) -> None:
        answer = upload(raw, files, lora_config={**LORA, "train_unembed": False})
        assert answer.status_code == 400
        assert "unembed_tokens" in detail(answer)

    def test_an_upload_that_is_not_whole_or_not_there(self, raw: Raw, files: Files) -> None:
        started = start(raw)
        httpx.put(started["urls"]["adapter_config.json"], content=files["adapter_config.json"])
        answer = raw.post("external_weights_upload_finish", {"upload_id": started["upload_id"]})
        assert answer.status_code == 400
        assert "adapter_model.safetensors has not been uploaded" in detail(answer)
        for wrong in ("nonsense", "../x", "0" * 32):
            answer = raw.post("external_weights_upload_finish", {"upload_id": wrong})
            assert answer.status_code == 404

    def test_strangers_can_neither_finish_it_nor_write_into_it(
        self, server: Server, raw: Raw, files: Files
    ) -> None:
        started = start(raw)
        for name, content in files.items():
            httpx.put(started["urls"][name], content=content)
        stranger = server.raw(server.new_key("an-uploads-stranger"))
        answer = stranger.post("external_weights_upload_finish", {"upload_id": started["upload_id"]})
        assert answer.status_code == 404
        url = started["urls"]["adapter_config.json"]
        for wrong in (url.partition("?")[0], url + "0", url.replace("adapter_config.json", "x")):
            assert httpx.put(wrong, content=b"x").status_code == 403
        signer, soon = Signer(server.data / "url-signing.key"), int(time.time()) + 60
        where = f"{server.url}/api/v1/external_weights_uploads/{started['upload_id']}/"
        for name in ("../../../evil", "evil", ".."):
            query = {"expires": soon, "signature": signer.sign(f"PUT {started['upload_id']}/{name}", soon)}
            quoted = name.replace("/", "%2f").replace("..", "%2e%2e")
            assert httpx.put(where + quoted, params=query, content=b"x").status_code in (401, 404)
        assert not list(server.data.parent.rglob("evil"))

    def test_a_file_that_is_too_large_is_not_kept(self, server: Server, raw: Raw) -> None:
        started = start(raw)
        answer = httpx.put(started["urls"]["adapter_config.json"], content=io.BytesIO(b"x" * (2 << 20)))
        assert answer.status_code == 400
        assert "larger than 1048576 bytes" in detail(answer)
        folder = server.data / "blobs" / "uploads" / started["upload_id"]
        assert list(folder.iterdir()) == []


def test_an_upload_survives_a_restart_and_nothing_is_left_of_it(
    hardy: Server, training: tinker.TrainingClient, files: Files
) -> None:
    raw = hardy.raw()
    started = start(raw)
    for name, content in files.items():
        assert httpx.put(started["urls"][name], content=content).status_code == 200
    hardy.kill()
    hardy.start()
    body = {"upload_id": started["upload_id"]}
    path = hardy.raw().ok("external_weights_upload_finish", body)["tinker_path"]
    hardy.kill()
    hardy.start()
    assert list((hardy.data / "blobs" / "uploads").iterdir()) == []
    assert hardy.raw().ok("weights_info", {"tinker_path": path})["lora_rank"] == 4
