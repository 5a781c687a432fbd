"""Reading Anthropic's requests. What cannot be honoured is refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tinsmith.service.completions import Target, Wanted
from tinsmith.text.tool_calls import Format, format_of
from tinsmith.wire.fields import Fields

from .doors import read_stops, read_top_p, refuse_unknown, refuse_unless
from .openai_requests import render

_INT32 = 2**31 - 1
_PROMPT = {"model", "messages", "system", "tools", "tool_choice", "thinking", "cache_control"}
_SAMPLING = {
    "max_tokens",
    "metadata",
    "stop_sequences",
    "stream",
    "temperature",
    "top_k",
    "top_p",
    "service_tier",
}


@dataclass(frozen=True, slots=True)
class MessagesRequest:
    model: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    thinking: bool | None  # None: as the model's template has it
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    stop: tuple[str, ...]
    stream: bool

    @classmethod
    def read(cls, fields: Fields, *, count: bool = False) -> MessagesRequest:
        """With `count`, a request that only has its tokens counted."""
        refuse_unknown(fields, _PROMPT if count else _PROMPT | _SAMPLING, "/v1/messages")
        refuse_unless(fields, "service_tier", "auto", "standard_only")
        tools = _read_tools(fields) if fields.has("tools") else []
        choice = fields.optional_child("tool_choice")
        if choice is not None:
            refuse_unless(choice, "type", "auto", "none")
            refuse_unless(choice, "disable_parallel_tool_use", False)
            if choice.raw("type") == "none":
                tools = []
        messages = _read_system(fields) + _read_messages(fields)
        top_k = fields.optional_integer("top_k", least=0, most=_INT32)
        return cls(
            model=fields.text("model", longest=4096),
            messages=messages,
            tools=tools,
            thinking=_read_thinking(fields),
            max_tokens=None if count else fields.integer("max_tokens", least=1, most=_INT32),
            temperature=fields.number("temperature", 1.0, least=0.0),
            top_p=read_top_p(fields),
            top_k=-1 if top_k is None else top_k,
            stop=read_stops(fields, "stop_sequences"),
            stream=fields.flag("stream", False),
        )

    def calls(self, target: Target) -> Format | None:
        """How the model writes its calls, if there may be some that can be read."""
        return format_of(target.tokenizer.template) if self.tools else None

    async def prompt(self, target: Target) -> list[int]:
        options: dict[str, Any] = {}
        if self.thinking or target.tokenizer.knows("enable_thinking"):
            options["enable_thinking"] = bool(self.thinking)
        go_on = self.messages[-1]["role"] == "assistant"
        return await render(target, self.messages, self.tools, options, go_on=go_on)

    def wanted(self, target: Target, prompt: list[int]) -> Wanted:
        calls = self.calls(target)
        return Wanted(
            special=bool(self.tools) and (calls is None or calls.special),
            prompts=[prompt],
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop,
        )


def _read_thinking(fields: Fields) -> bool:
    thinking = fields.optional_child("thinking")
    if thinking is None:
        return False
    kind = thinking.text("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise thinking.error("type", "must be 'enabled', 'adaptive' or 'disabled'")
    refuse_unknown(thinking, {"type", "budget_tokens"}, "thinking")
    return kind != "disabled"


def _read_tools(fields: Fields) -> list[dict[str, Any]]:
    tools = []
    for place, item in enumerate(fields.array("tools")):
        tool = Fields(item, f"tools[{place}]")
        refuse_unless(tool, "type", "custom")
        known = {"type", "name", "description", "input_schema", "cache_control", "strict"}
        refuse_unknown(tool, known, "tools")
        refuse_unless(tool, "strict", False)
        function: dict[str, Any] = {"name": tool.text("name")}
        if (description := tool.optional_text("description", longest=1 << 20)) is not None:
            function["description"] = description
        function["parameters"] = dict(tool.child("input_schema").values())
        tools.append({"type": "function", "function": function})
    return tools


def _read_system(fields: Fields) -> list[dict[str, Any]]:
    system = fields.raw("system")
    if system is None or system == "" or system == []:
        return []
    return [{"role": "system", "content": _read_texts(fields, "system")}]


def _read_texts(fields: Fields, name: str) -> str:
    """A text, or a list of blocks of text."""
    value = fields.raw(name)
    if isinstance(value, str):
        return value
    texts = []
    for place, item in enumerate(fields.array(name)):
        block = Fields(item, f"{fields.where}.{name}[{place}]".lstrip("."))
        texts.append(_read_text(block))
    return "\n".join(texts)


def _read_text(block: Fields) -> str:
    kind = block.raw("type")
    if kind != "text":
        raise block.error("type", f"{str(kind)[:40]!r} is not offered by this server here; use 'text'")
    refuse_unknown(block, {"type", "text", "cache_control", "citations"}, "blocks")
    refuse_unless(block, "citations", [])
    text = block.raw("text")
    if not isinstance(text, str):
        raise block.error("text", "must be a text")
    return text


def _read_messages(fields: Fields) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for place, item in enumerate(fields.array("messages")):
        message = Fields(item, f"messages[{place}]")
        role = message.text("role")
        if role not in ("user", "assistant"):
            raise message.error(
                "role", "must be 'user' or 'assistant'; what the system says goes into system"
            )
        refuse_unknown(message, {"role", "content"}, "messages")
        content = message.raw("content")
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
            continue
        blocks = [
            Fields(block, f"messages[{place}].content[{i}]")
            for i, block in enumerate(message.array("content"))
        ]
        messages += _read_assistant(blocks) if role == "assistant" else _read_user(blocks)
    if not messages:
        raise fields.error("messages", "must have at least one message with content")
    return messages


def _read_user(blocks: list[Fields]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for block in blocks:
        if block.raw("type") == "tool_result":
            refuse_unknown(
                block, {"type", "tool_use_id", "content", "is_error", "cache_control"}, "tool results"
            )
            text = _read_texts(block, "content") if block.has("content") else ""
            if block.flag("is_error", False):
                text = f"Error: {text}"
            found.append({"role": "tool", "tool_call_id": block.text("tool_use_id"), "content": text})
        elif found and found[-1]["role"] == "user":
            found[-1]["content"] += "\n" + _read_text(block)
        else:
            found.append({"role": "user", "content": _read_text(block)})
    return found


def _read_assistant(blocks: list[Fields]) -> list[dict[str, Any]]:
    texts, thoughts, calls = [], [], []
    for block in blocks:
        kind = block.raw("type")
        if kind == "thinking":
            refuse_unknown(block, {"type", "thinking", "signature"}, "thoughts")
            thinking = block.raw("thinking")
            if not isinstance(thinking, str):
                raise block.error("thinking", "must be a text")
            thoughts.append(thinking)
        elif kind == "tool_use":
            refuse_unknown(block, {"type", "id", "name", "input", "cache_control", "caller"}, "tool uses")
            function = {"name": block.text("name"), "arguments": dict(block.child("input").values())}
            calls.append({"id": block.text("id"), "type": "function", "function": function})
        else:
            texts.append(_read_text(block))
    if not (texts or thoughts or calls):
        return []
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return [message]
