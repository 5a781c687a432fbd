"""Images through the official SDK, against a server whose model has eyes."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator

import anthropic
import httpx
import numpy as np
import openai
import PIL.Image
import pytest
import tinker
from tinker import types
from transformers import AutoTokenizer

from tests.engine.tiny import IMAGE_TOKEN, make_vision_model
from tests.harness import KEY, MODEL, Raw, Server, detail

TOKENS = 8  # of the picture
PLACE = "<|image_pad|>"
# Qwen's way of showing images, in short.
TEMPLATE = """\
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<|image_pad|>' }}{%- else %}{{- part.text }}{%- endif %}{%- endfor %}
{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


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
    model = make_vision_model("Qwen3VL", root / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    fill = [f"<|{id_}|>" for id_ in range(len(tokenizer), IMAGE_TOKEN)]
    tokenizer.add_tokens([*fill, PLACE], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    server = Server(model, root / "data")
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


# By the other doors


def data_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def url(data: bytes, form: str = "png") -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/{form};base64,{data_of(data)}"}}


def asked(*parts: dict) -> list:
    return [{"role": "user", "content": [{"type": "text", "text": "what "}, *parts]}]


def test_a_picture_in_a_chat_is_what_the_sdk_shows(server: Server, client: tinker.ServiceClient) -> None:
    tokenizer = AutoTokenizer.from_pretrained(server.models[MODEL])
    before, after = (
        tokenizer.encode(t) for t in ("<|im_start|>user\nwhat ", "<|im_end|>\n<|im_start|>assistant\n")
    )
    image = types.ImageChunk(data=picture(), format="png")
    chunks = [types.EncodedTextChunk(tokens=before), image, types.EncodedTextChunk(tokens=after)]
    sampler = client.create_sampling_client(base_model=MODEL).result()
    params = types.SamplingParams(max_tokens=6, temperature=0, stop=[])
    [theirs] = sampler.sample(types.ModelInput(chunks=chunks), 1, params).result().sequences
    door = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    wanted = {"model": MODEL, "max_tokens": 6, "temperature": 0, "logprobs": True}
    answer = door.chat.completions.create(messages=asked(url(picture())), **wanted)
    ours = [token.logprob for token in answer.choices[0].logprobs.content]
    assert ours == pytest.approx(theirs.logprobs)
    assert answer.usage.prompt_tokens == len(before) + TOKENS + len(after)
    chunks = list(
        door.chat.completions.create(
            messages=asked(url(picture())), **wanted, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens
    two = asked(url(picture()), {"type": "text", "text": "or"}, url(picture("JPEG"), "jpeg"))
    more = door.chat.completions.create(messages=two, **wanted).usage.prompt_tokens
    assert more == answer.usage.prompt_tokens + TOKENS + 2

    source = {"type": "base64", "media_type": "image/png", "data": data_of(picture())}
    message = anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0).messages.create(
        model=MODEL,
        max_tokens=6,
        messages=asked({"type": "image", "source": source}),
        extra_body={"temperature": 0},
    )
    assert "".join(b.text for b in message.content) == answer.choices[0].message.content
    assert message.usage.input_tokens == answer.usage.prompt_tokens


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([url(picture()[:100])], "messages[0].content[1].image_url.url: cannot be decoded as png"),
        ([url(picture("JPEG"))], "messages[0].content[1].image_url.url: has the format 'png'"),
        ([url(picture()), url(picture())], "messages[0].content[2].image_url.url: stands directly behind"),
        ([{"type": "text", "text": PLACE}], "messages: have 0 images, but are written with 1 places"),
        ([url(b"")], "messages[0].content[1].image_url.url: has no bytes"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_picture_in_a_chat_is_a_400_that_names_it(
    server: Server, parts: list, says: str, stream: bool
) -> None:
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"model": MODEL, "messages": asked(*parts), "max_tokens": 2, "stream": stream},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=60,
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(says)
