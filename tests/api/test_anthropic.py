"""Anthropic's client at this server."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import pytest

from tests.api.doors import ANSWER, QUESTION, RIDDLE, TOOL, teach, tokenizer_of
from tests.harness import KEY, MODEL, Server

ASK = [{"role": "user", "content": "hello"}]
TOOLS = [{"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["schema"]}]


@pytest.fixture(scope="module")
def client(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def tokenizer(server: Server) -> Any:
    return tokenizer_of(server.models[MODEL])


@pytest.fixture(scope="module")
def weights(server: Server) -> str:
    return teach(server, server.models[MODEL])


def say(client: anthropic.Anthropic, **wanted: Any) -> Any:
    return client.messages.create(
        **{"model": MODEL, "max_tokens": 20, "messages": ASK, "extra_body": {"temperature": 0}, **wanted}
    )


def shown(source: dict) -> dict:
    return {"messages": [{"role": "user", "content": [{"type": "image", "source": source}]}]}


@pytest.mark.parametrize("root", ["", "/anthropic/api", "/services/tinker-prod/anthropic/api"])
def test_a_message_goes_through_the_template(server: Server, tokenizer: Any, root: str) -> None:
    client = anthropic.Anthropic(base_url=server.url + root, api_key=KEY)
    messages = [{"role": "system", "content": "be"}, *ASK]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    answer = say(client, system="be")
    assert (answer.role, answer.type, answer.stop_reason) == ("assistant", "message", "max_tokens")
    assert answer.usage.input_tokens == len(prompt)
    assert answer.usage.output_tokens == 20
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 20, "temperature": 0}
    headers = {"Authorization": f"Bearer {KEY}"}
    same = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).json()
    assert answer.content[0].text == same["choices"][0]["text"]
    count = client.messages.count_tokens(model=MODEL, messages=ASK, system=[{"type": "text", "text": "be"}])
    assert count.input_tokens == len(prompt)


def test_a_stream_has_its_events_in_order(client: anthropic.Anthropic, weights: str) -> None:
    whole = say(client, model=weights)
    events = list(say(client, model=weights, stream=True))
    kinds = [event.type for event in events]
    deltas = kinds.count("content_block_delta")
    assert deltas > 5
    assert [kind for kind in kinds if kind != "ping"] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    text = "".join(event.delta.text for event in events if event.type == "content_block_delta")
    assert text == whole.content[0].text
    assert ANSWER.startswith(text.rstrip("\ufffd"))
    assert events[0].message.usage.input_tokens == whole.usage.input_tokens
    assert events[-2].delta.stop_reason == "max_tokens"
    assert events[-2].usage.output_tokens == 20
    with client.messages.stream(
        model=weights, max_tokens=20, messages=ASK, extra_body={"temperature": 0}
    ) as stream:
        assert stream.get_final_message().content[0].text == text


def test_models_are_listed_in_anthropics_words(server: Server, client: anthropic.Anthropic) -> None:
    for each in (client, anthropic.Anthropic(base_url=f"{server.url}/anthropic/api", api_key=KEY)):
        [model] = each.models.list()
        assert (model.id, model.type, model.lifecycle) == (MODEL, "model", "active")
        assert each.models.retrieve(MODEL) == model
        assert list(each.models.list(after_id=MODEL)) == []
    with pytest.raises(anthropic.BadRequestError, match="after_id: there is no model"):
        client.models.list(after_id="x")
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("nobody/knows")


def test_an_answer_that_has_begun_goes_on(client: anthropic.Anthropic, tokenizer: Any) -> None:
    begun = [*ASK, {"role": "assistant", "content": "well"}]
    count = client.messages.count_tokens(model=MODEL, messages=begun).input_tokens
    assert count == client.messages.count_tokens(model=MODEL, messages=ASK).input_tokens + 4


def test_turns_of_one_role_are_one_turn(client: anthropic.Anthropic) -> None:
    def count(*messages: dict) -> int:
        return client.messages.count_tokens(model=MODEL, messages=list(messages)).input_tokens

    block = {"role": "user", "content": [{"type": "text", "text": "world"}]}
    assert count(*ASK, block) == count({"role": "user", "content": "hello\nworld"})
    said = [{"role": "assistant", "content": text} for text in ("a", "b")]
    assert count(*ASK, *said) == count(*ASK, {"role": "assistant", "content": "a\nb"})


def test_stop_sequences(client: anthropic.Anthropic, weights: str) -> None:
    whole, stop = ANSWER, "東京"
    answer = say(client, model=weights, stop_sequences=[stop], max_tokens=60)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert answer.content[0].text == whole[: whole.index(stop)]


def test_tools_are_used(client: anthropic.Anthropic, weights: str) -> None:
    wanted = {"model": weights, "tools": TOOLS, "max_tokens": 120}
    wanted["messages"] = [{"role": "user", "content": QUESTION}]
    answer = say(client, **wanted)
    [block] = answer.content
    assert (answer.stop_reason, block.type, block.name) == ("tool_use", "tool_use", "weather")
    assert block.input == {"city": "Köln"}
    events = list(say(client, **wanted, stream=True))
    assert events[-2].delta.stop_reason == "tool_use"
    [delta] = [event.delta for event in events if event.type == "content_block_delta"]
    assert json.loads(delta.partial_json) == {"city": "Köln"}
    result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "rain"}]}
    after = [
        *wanted["messages"],
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    assert say(client, **{**wanted, "messages": after, "max_tokens": 4}).usage.output_tokens == 4


def test_thoughts_are_blocks_where_they_are_asked_for(client: anthropic.Anthropic, weights: str) -> None:
    wanted = {"model": weights, "messages": [{"role": "user", "content": RIDDLE}], "max_tokens": 60}
    wanted["thinking"] = {"type": "enabled", "budget_tokens": 20}
    thought, said = say(client, **wanted).content
    assert (thought.type, thought.thinking, said.text) == ("thinking", "hm, 東\n", "so")
    with client.messages.stream(**wanted, extra_body={"temperature": 0}) as stream:
        streamed = stream.get_final_message()
    assert [block.type for block in streamed.content] == ["thinking", "text"]
    assert streamed.content[0].thinking == thought.thinking
    after = [*wanted["messages"], {"role": "assistant", "content": [thought, said]}, *ASK]
    assert say(client, **{**wanted, "messages": after, "max_tokens": 4}).usage.input_tokens > len(RIDDLE)


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "any"}}, "tool_choice.type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"extra_body": {"mcp_servers": [{}]}}, "mcp_servers"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        (shown({"type": "url", "url": "http://x/y.png"}), "messages[0].content[0].source.type"),
        (
            shown({"type": "base64", "media_type": "image/png", "data": "AA=="}),
            "messages[0].content[0].source.data: is an image, which tests/tiny does not take",
        ),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"tools": [{**TOOLS[0], "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [*TOOLS, *TOOLS]}, "tools[1].name"),
        ({"extra_body": {"tool_choice": {}}}, "tool_choice.type"),
        ({"extra_body": {"context_management": {"edits": [{}]}}}, "context_management"),
        ({"extra_body": {"metadata": {"user_id": 5}}}, "metadata.user_id"),
        ({"extra_body": {"output_config": {"effort": "low"}}}, "output_config.effort"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    client: anthropic.Anthropic, wanted: dict, named: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as refused:
        say(client, **wanted)
    body = refused.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"].startswith(named)


def test_errors_have_the_shape_that_the_client_knows(server: Server, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        say(client, model="nobody/knows")
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.AuthenticationError):
        say(anthropic.Anthropic(base_url=server.url, api_key="tml-wrong"))
