"""Images through the official SDK, against a server whose model has eyes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import numpy as np
import PIL.Image
import pytest
import tinker
from tinker import types

from tests.engine.tiny import make_vision_model
from tests.harness import MODEL, Raw, Server, detail

TOKENS = 8  # of the picture


def picture(form: str = "PNG") -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)
    data = io.BytesIO()
    PIL.Image.fromarray(noise).save(data, form)
    return data.getvalue()


def seen(expected: int | None = TOKENS, data: bytes | None = None) -> types.ModelInput:
    image = types.ImageChunk(data=data or picture(), format="png", expected_tokens=expected)
    after = types.EncodedTextChunk(tokens=[7, 8, 9])
    return types.ModelInput(chunks=[types.EncodedTextChunk(tokens=[1, 2]), image, after])


def datum(model_input: types.ModelInput) -> types.Datum:
    return types.Datum(
        model_input=model_input,
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=[5] * (TOKENS + 5), dtype="int64"),
            "weights": types.TensorData(data=[0.0] * (TOKENS + 1) + [1.0] * 4, dtype="float32"),
        },
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("images")
    server = Server(make_vision_model("Qwen3VL", root / "model"), root / "data")
    yield server.start()
    server.end()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[tinker.ServiceClient]:
    with server.sdk() as client:
        yield client


def test_training_on_an_image_makes_the_answer_likelier_in_sampling(client: tinker.ServiceClient) -> None:
    training = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
    losses = []
    for _ in range(4):
        result = training.forward_backward([datum(seen())], "cross_entropy")
        step = training.optim_step(types.AdamParams(learning_rate=1e-2))
        losses.append(result.result().metrics["loss:sum"])
        assert result.result().loss_fn_outputs[0]["logprobs"].shape == [TOKENS + 5]
        step.result()
    assert losses[-1] < losses[0]
    sampler = training.save_weights_and_get_sampling_client().result()
    prompt = seen()
    trained = training.forward([datum(prompt)], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data
    longer = prompt.append(types.EncodedTextChunk(tokens=[5]))
    assert sampler.compute_logprobs(longer).result()[-1] == trained[-1]
    out = sampler.sample(prompt, 2, types.SamplingParams(max_tokens=3, seed=1)).result()
    assert [len(sequence.tokens) for sequence in out.sequences] == [3, 3]


def test_an_image_counts_as_its_places_in_the_books(server: Server) -> None:
    with server.sdk(server.new_key("seer")) as client:
        training = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        training.forward_backward([datum(seen()), datum(seen())], "cross_entropy").result()
        sampler = client.create_sampling_client(base_model=MODEL).result()
        params = types.SamplingParams(max_tokens=3, seed=1, stop=[])
        for _ in range(2):  # less than a page of the cache: computed each time
            sampler.sample(seen(), 4, params).result()
    (row,) = json.loads(server.operate("usage", "--org", "seer", "--json"))
    counted = {kind: row[kind] for kind in ("train", "prefill", "cached_prefill", "sample")}
    places = TOKENS + 5
    assert counted == {"train": 2 * places, "prefill": 2 * places, "cached_prefill": 0, "sample": 24}


@pytest.mark.parametrize(
    ("model_input", "says"),
    [
        (seen(expected=9), r"chunks\[1\].expected_tokens is 9; this model makes 8"),
        (seen(data=picture()[:100]), r"chunks\[1\] cannot be decoded as png"),
        (
            seen(data=picture("GIF")),
            r"chunks\[1\] cannot be decoded as png: its bytes are those of no png or jpeg",
        ),
        (seen(data=picture("JPEG")), r"chunks\[1\] has the format 'png', but its data is jpeg"),
    ],
)
def test_a_bad_image_fails_by_name_and_the_run_goes_on(
    client: tinker.ServiceClient, model_input: types.ModelInput, says: str
) -> None:
    training = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
    with pytest.raises(tinker.RequestFailedError, match=rf"data\[0\].model_input.{says}"):
        training.forward_backward([datum(model_input)], "cross_entropy").result()
    sampler = client.create_sampling_client(base_model=MODEL).result()
    with pytest.raises(tinker.RequestFailedError, match=rf"prompt.{says}"):
        sampler.sample(model_input, 1, types.SamplingParams(max_tokens=1)).result()
    assert training.forward([datum(seen())], "cross_entropy").result().metrics["loss:sum"] > 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": "%%%"}, "prompt.chunks[0].data"),
        ({"data": None}, "prompt.chunks[0].data"),
        ({"expected_tokens": -1}, "prompt.chunks[0].expected_tokens"),
        ({"override_dimensions": {"width": 0, "height": 1}}, "prompt.chunks[0].override_dimensions.width"),
        ({"expected_tokens": 600}, "600"),
    ],
)
def test_an_image_that_cannot_be_read_is_a_4xx_that_names_the_field(
    server: Server, change: dict[str, object], says: str
) -> None:
    chunk = {"type": "image", "data": "AAAA", "format": "png", **change}
    raw: Raw = server.raw()
    answer = raw.post("asample", {"base_model": MODEL, "prompt": {"chunks": [chunk]}})
    assert answer.status_code == 400
    assert says in detail(answer)
