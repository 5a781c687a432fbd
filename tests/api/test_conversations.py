"""What both doors make of a chat, before any model is asked."""

from __future__ import annotations

from typing import Any

import pytest

from tinsmith.api.anthropic_requests import MessagesRequest
from tinsmith.api.conversations import Chat
from tinsmith.api.openai_requests import ChatRequest
from tinsmith.wire.errors import WireError
from tinsmith.wire.fields import Fields

PNG = "data:image/png;base64,iVBORw0KGgo="


def of_openai(*messages: dict[str, Any], **more: Any) -> Chat:
    return ChatRequest.read(Fields({"model": "m", "messages": list(messages), **more})).chat


def of_anthropic(*messages: dict[str, Any], **more: Any) -> Chat:
    body = {"model": "m", "max_tokens": 1, "messages": list(messages), **more}
    return MessagesRequest.read(Fields(body)).chat


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def block(data: str = "iVBORw0KGgo=") -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def test_images_stand_between_texts_in_the_order_of_the_messages() -> None:
    chat = of_openai(
        {"role": "user", "content": [text("a"), text("b"), image(PNG), text("c")]},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": [image(PNG.replace("png;", "JPEG;charset=x;").upper().replace(
            "IVBORW0KGGO=", "/9j/"
        ))]},
    )  # fmt: skip
    assert [m["content"] for m in chat.messages] == [
        [text("a\nb"), {"type": "image"}, text("c")],
        "x",
        [{"type": "image"}],
    ]
    assert [(p.where, p.format) for p in chat.pictures] == [
        ("messages[0].content[2].image_url.url", "png"),
        ("messages[2].content[0].image_url.url", "jpeg"),
    ]
    assert chat.pictures[0].data == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    "url",
    ["", "x", "http://x/y.png", "file:///etc/passwd", "data:,x", "data:image/png,x", "data:image/png;base64",
     "data:image/png;base64,", "data:image/png;base64,%%", "data:image/svg+xml;base64,AA==",
     "data:;base64,AA==",
     " data:image/png;base64,AA==", "data:image/png;base64,AA==\n"],
)  # fmt: skip
def test_what_is_no_image_is_refused_by_name(url: str) -> None:
    with pytest.raises(WireError) as refused:
        of_openai({"role": "user", "content": [image(url)]})
    assert refused.value.field == "messages[0].content[0].image_url.url"


@pytest.mark.parametrize("role", ["system", "assistant", "developer"])
def test_only_users_and_tools_show_images(role: str) -> None:
    with pytest.raises(WireError, match=r"messages\[0\].content\[0\].type: 'image_url' is not offered"):
        of_openai({"role": role, "content": [image(PNG)]})


def test_tools_may_answer_with_images() -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "is_error": True, "content": [block(), text("b")]}
    chat = of_anthropic(
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]},
        {"role": "user", "content": [result, text("so?"), block()]},
    )
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool", "user"]
    assert chat.messages[2]["content"] == [text("Error: "), {"type": "image"}, text("b")]
    assert chat.messages[3]["content"] == [text("so?"), {"type": "image"}]
    assert [p.where for p in chat.pictures] == [
        "messages[2].content[0].content[0].source.data",
        "messages[2].content[2].source.data",
    ]


def test_turns_that_go_on_keep_all_that_was_said() -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": ""}
    use = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    chat = of_anthropic(
        {"role": "user", "content": "a"},
        {"role": "user", "content": [block(), text("b")]},
        {"role": "assistant", "content": [thought, text("x")]},
        {"role": "assistant", "content": [thought, use]},
        {"role": "assistant", "content": "more"},
        system="be",
    )
    system, user, said, last = chat.messages
    assert system == {"role": "system", "content": "be"}
    assert user["content"] == [text("a"), {"type": "image"}, text("b")]
    assert (said["content"], said["reasoning_content"]) == ("x", "hm\nhm")
    assert [call["id"] for call in said["tool_calls"]] == ["t"]
    assert last == {"role": "assistant", "content": "more"}


@pytest.mark.parametrize(
    ("thinking", "wanted"),
    [(None, (False, False)), ({"type": "disabled"}, (False, False)), ({"type": "adaptive"}, (True, True)),
     ({"type": "enabled", "budget_tokens": 2000}, (True, False))],
)  # fmt: skip
def test_thoughts_are_off_where_nobody_asks(thinking: object, wanted: tuple[bool, bool]) -> None:
    chat = of_anthropic({"role": "user", "content": "a"}, thinking=thinking)
    assert (chat.thinking, chat.adaptive) == wanted


def test_tools_that_may_not_be_called_are_not_told_of() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": None}}]
    user = {"role": "user", "content": "a"}
    assert of_openai(user, tools=tools).tools == [{"type": "function", "function": {"name": "f"}}]
    assert of_openai(user, tools=tools, tool_choice="none").tools == []
    for choice in ("required", {"type": "function", "function": {"name": "f"}}, {"type": "allowed_tools"}):
        with pytest.raises(WireError, match="tool_choice: cannot be honoured"):
            of_openai(user, tools=tools, tool_choice=choice)
