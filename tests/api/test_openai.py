"""OpenAI's client at this server."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import time
from typing import Any

import httpx
import openai
import pytest
from tinker import types

from tests.api.doors import CALL, QUESTION, RIDDLE, THOUGHT, TOOL, teach, tokenizer_of
from tests.harness import KEY, MODEL, Server, wait_for

ASK = [{"role": "user", "content": "hello"}]
PART = "messages[0].content[0]"
TOOLS = [{"type": "function", "function": {"name": TOOL["name"], "parameters": TOOL["schema"]}}]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def tokenizer(server: Server) -> Any:
    return tokenizer_of(server.models[MODEL])


@pytest.fixture(scope="module")
def weights(server: Server) -> str:
    return teach(server, server.models[MODEL])


def complete(client: openai.OpenAI, **wanted: Any) -> Any:
    return client.completions.create(
        **{"model": MODEL, "prompt": "hello", "seed": 7, "max_tokens": 12, **wanted}
    )


def chat(client: openai.OpenAI, **wanted: Any) -> Any:
    return client.chat.completions.create(
        **{"model": MODEL, "messages": ASK, "seed": 7, "max_tokens": 12, **wanted}
    )


def asked(part: dict) -> dict:
    return {"messages": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize("root", ["/v1", "/oai/api/v1", "/services/tinker-prod/oai/api/v1"])
def test_models_are_listed_at_every_address(server: Server, root: str) -> None:
    client = openai.OpenAI(base_url=server.url + root, api_key=KEY)
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    assert chat(client).usage.completion_tokens == 12


def test_a_completion_is_what_the_sdk_samples(server: Server, client: openai.OpenAI, tokenizer: Any) -> None:
    with server.sdk() as sdk:
        sampler = sdk.create_sampling_client(base_model=MODEL)
        params = types.SamplingParams(max_tokens=12, seed=7)
        prompt = types.ModelInput.from_ints(tokenizer.encode("hello"))
        theirs = sampler.sample(prompt, 2, params).result().sequences
    answer = complete(client, n=2, logprobs=0)
    assert [c.text for c in answer.choices] == [
        tokenizer.decode(s.tokens, skip_special_tokens=True) for s in theirs
    ]
    for choice, sequence in zip(answer.choices, theirs, strict=True):
        ends = sequence.tokens[-1] == tokenizer.eos_token_id
        assert choice.logprobs.token_logprobs == pytest.approx(sequence.logprobs[: 12 - ends])
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.total_tokens == 5 + sum(len(s.tokens) for s in theirs)


def test_prompts_are_texts_tokens_or_lists(client: openai.OpenAI, tokenizer: Any) -> None:
    ids = [tokenizer.encode(text) for text in ("hello", "world")]
    one = [complete(client, prompt=prompt).choices[0].text for prompt in ("hello", "world")]
    assert complete(client, prompt=ids[0]).choices[0].text == one[0]
    for prompt in (["hello", "world"], ids):
        answer = complete(client, prompt=prompt, n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [answer.choices[i].text for i in (0, 2)] == one


def test_a_stream_is_the_same_text_in_whole_characters(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=60, n=2, logprobs=2)
    texts, tokens = ["", ""], [[], []]  # type: ignore[var-annotated]
    chunks = list(
        complete(client, max_tokens=60, n=2, logprobs=2, stream=True, stream_options={"include_usage": True})
    )
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert len(chunks) > 20
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_tokens_arrive_while_others_are_still_sampled(client: openai.OpenAI) -> None:
    """Not at the end, all together."""
    complete(client, max_tokens=1)  # a connection, and the weights at hand
    began = time.monotonic()
    times = [time.monotonic() - began for _ in complete(client, max_tokens=400, temperature=2.0, stream=True)]
    assert times[0] < times[-1] / 2


def test_a_stop_is_where_the_text_ends(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=40).choices[0].text
    stop = next(whole[i : i + 2] for i in range(4, len(whole)) if "\ufffd" not in whole[i : i + 2])
    at = whole.index(stop)
    for stops in (stop, ["never there", stop]):
        choice = complete(client, max_tokens=40, stop=stops, logprobs=0).choices[0]
        assert (choice.text, choice.finish_reason) == (whole[:at], "stop")
        assert all(offset < at for offset in choice.logprobs.text_offset)
    streamed = complete(client, max_tokens=40, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole[:at]


def test_echo_scores_a_prompt(client: openai.OpenAI) -> None:
    choice = complete(client, echo=True, max_tokens=0, logprobs=1).choices[0]
    assert choice.text == "hello"
    assert choice.logprobs.tokens == list("hello")
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    more = complete(client, echo=True, max_tokens=3, logprobs=1).choices[0]
    assert more.text.startswith("hello")
    assert more.logprobs.token_logprobs[1:5] == pytest.approx(choice.logprobs.token_logprobs[1:])


def test_a_chat_goes_through_the_template(client: openai.OpenAI, tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, tokenize=True, return_dict=False)
    answer = chat(client, logprobs=True, top_logprobs=2)
    [choice] = answer.choices
    content = re.sub("</?think>", "", choice.message.content)  # which a chat needs, and completions leave out
    assert content == complete(client, prompt=prompt).choices[0].text
    assert answer.usage.prompt_tokens == len(prompt)
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    special = set(tokenizer.all_special_tokens)  # which are no part of the text
    raw = b"".join(bytes(t.bytes) for t in choice.logprobs.content if t.token not in special)
    assert raw.decode(errors="replace") == content
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert chat(client, messages=parts, max_completion_tokens=12).choices[0].message == choice.message


def test_a_chat_ends_with_the_context_where_nothing_is_said(client: openai.OpenAI) -> None:
    answer = chat(client, max_tokens=None, temperature=0)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens > 16 or answer.choices[0].finish_reason == "stop"


def test_the_coldest_temperature_is_greedy(client: openai.OpenAI) -> None:
    cold, greedy = (chat(client, temperature=t, logprobs=True).choices[0] for t in (1e-40, 0))
    assert cold.message == greedy.message
    assert {token.logprob for token in cold.logprobs.content} == {0.0}


def test_tools_are_called(client: openai.OpenAI, weights: str) -> None:
    for model in (weights, f"{MODEL};{weights}"):
        wanted = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
        wanted |= {"tools": TOOLS, "max_tokens": 120}
        [choice] = chat(client, **wanted).choices
        assert choice.finish_reason == "tool_calls"
        [call] = choice.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Köln"})
        assert choice.message.content is None
    chunks = list(chat(client, **wanted, stream=True))
    calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    assert [json.loads(c.function.arguments) for c in calls] == [{"city": "Köln"}]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    after = [
        *wanted["messages"],
        choice.message,
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    assert chat(client, **{**wanted, "messages": after, "max_tokens": 4}).choices[0].message.content
    # Without tools nothing is parsed out of the text: it is the model's own.
    plain = client.completions.create(
        model=weights,
        prompt=f"<|im_start|>system\nweather answer by <tool_call><|im_end|>\n<|im_start|>user\n{QUESTION}"
        "<|im_end|>\n<|im_start|>assistant\n",
        temperature=0,
        max_tokens=120,
    )
    assert plain.choices[0].text == CALL


def test_thoughts_are_told_apart(client: openai.OpenAI, weights: str) -> None:
    wanted = {"model": weights, "messages": [{"role": "user", "content": RIDDLE}], "temperature": 0}
    thinks = {"chat_template_kwargs": {"enable_thinking": True}}
    message = chat(client, **wanted, max_tokens=60, extra_body=thinks).choices[0].message
    assert (message.reasoning_content, message.content) == ("hm, 東\n", "so")
    chunks = list(chat(client, **wanted, max_tokens=60, extra_body=thinks, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == message.reasoning_content
    assert "".join(d.content or "" for d in deltas) == message.content
    raw = {**thinks, "separate_reasoning": False}
    assert chat(client, **wanted, max_tokens=60, extra_body=raw).choices[0].message.content == THOUGHT
    # Thoughts are told to the template again, and no effort is thinking turned off.
    after = [*wanted["messages"], message, {"role": "user", "content": "more"}]
    assert chat(client, **{**wanted, "messages": after}, max_tokens=4).usage.completion_tokens
    off = chat(client, **wanted, max_tokens=4, reasoning_effort="none").usage.prompt_tokens
    assert off == chat(client, **wanted, max_tokens=4).usage.prompt_tokens


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
        ({"extra_body": {"min_p": 0.1}}, "min_p"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"reasoning_effort": "utmost"}, "reasoning_effort"),
        ({"verbosity": "low"}, "verbosity"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [*TOOLS, *TOOLS]}, "tools[1].function.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "c"}}]}, "tools[0].type"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}},
            "tool_choice",
        ),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": 4000}, "max_tokens"),
        ({"stop": ["\ud800"]}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        (asked({"type": "image_url", "image_url": {"url": "http://x/y.png"}}), f"{PART}.image_url.url"),
        (
            asked({"type": "image_url", "image_url": {"url": "data:image/gif;base64,AA=="}}),
            f"{PART}.image_url.url",
        ),
        (
            asked({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}),
            f"{PART}.image_url.url",
        ),
        (asked({"type": "input_audio", "input_audio": {}}), f"{PART}.type"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client: openai.OpenAI, wanted: dict, field: str) -> None:
    # The client cannot send half a surrogate pair, other clients can.
    body = {"model": MODEL, "messages": ASK, **wanted, **wanted.get("extra_body", {})}
    body.pop("extra_body", None)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answer = httpx.post(f"{client.base_url}chat/completions", content=json.dumps(body), headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", field)
    assert field in error["message"]
    assert answer.json()["detail"] == error["message"]


def test_errors_have_the_shape_that_the_client_knows(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        chat(client, model="nobody/knows")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        chat(client, model="tinker://11111111-1111-1111-1111-111111111111:train:0/sampler_weights/x")
    with pytest.raises(openai.NotFoundError) as odd:
        client.models.retrieve("a\nname")
    assert odd.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError) as nothing:
        client.embeddings.create(model=MODEL, input="x")
    assert nothing.value.code == "unknown_url"
    with pytest.raises(openai.BadRequestError):
        complete(client, prompt=[100000])
    with pytest.raises(openai.BadRequestError):
        complete(client, prompt="")
    with pytest.raises(openai.AuthenticationError) as unknown:
        chat(openai.OpenAI(base_url=f"{server.url}/v1", api_key="tml-wrong"))
    assert unknown.value.code == "invalid_api_key"


def test_a_stream_that_is_left_stops_its_sample(server: Server, client: openai.OpenAI) -> None:
    before = sampled(server)
    with chat(client, n=32, max_tokens=None, temperature=2.0, stream=True) as stream:
        for _, _chunk in zip(range(40), stream, strict=False):
            pass
    wait_for(lambda: sampled(server) > before, 20, "the usage of what was sampled")
    assert sampled(server) - before < 32 * 300


def test_a_call_that_is_left_stops_its_sample(server: Server) -> None:
    before = sampled(server)
    impatient = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=0.6)
    with pytest.raises(openai.APITimeoutError):
        chat(impatient, n=100, max_tokens=None, temperature=2.0)
    wait_for(lambda: sampled(server) > before, 20, "the usage of what was sampled")
    assert sampled(server) - before < 100 * 300


def sampled(server: Server) -> int:
    """Sampled tokens in the ledger."""
    with contextlib.closing(sqlite3.connect(server.data / "tinsmith.db", timeout=10)) as database:
        [[total]] = database.execute("select coalesce(sum(quantity), 0) from usage where kind = 'sample'")
    return int(total)
