"""Reading Anthropic's requests. What cannot be honoured is refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tinsmith.service.completions import Prompt, Target, Wanted
from tinsmith.wire.fields import Fields

from .conversations import Chat, Picture, read_effort, read_name, read_picture
from .doors import read_stops, read_top_p, refuse_unknown, refuse_unless

_INT32 = 2**31 - 1
_PROMPT = {"model", "messages", "system", "tools", "tool_choice", "thinking", "cache_control"}
_PROMPT |= {"output_config", "speed", "context_management"}
_SAMPLING = {"max_tokens", "metadata", "stop_sequences", "stream", "temperature", "top_k", "top_p"}
_SAMPLING |= {"service_tier"}
_KEEP = {"type": "clear_thinking_20251015", "keep": "all"}  # thoughts of earlier turns, as always here


@dataclass(frozen=True, slots=True)
class MessagesRequest:
    model: str
    chat: Chat
    parallel: bool  # whether an answer may use more than one tool
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
        _check_labels(fields)
        refuse_unless(fields, "service_tier", "auto", "standard_only")
        refuse_unless(fields, "speed", "standard")
        refuse_unless(fields, "context_management", {}, {"edits": []}, {"edits": [_KEEP]})
        chat = Chat()
        _read_thinking(fields, chat)
        if (output := fields.optional_child("output_config")) is not None:
            refuse_unknown(output, {"effort"}, "output_config")
            chat.effort = read_effort(output, "effort")
        tools = _read_tools(fields) if fields.has("tools") else []
        choice = fields.optional_child("tool_choice") or Fields({"type": "auto"}, "tool_choice")
        if choice.text("type") not in ("auto", "none"):
            raise choice.error("type", "cannot be honoured by this server; set it to 'auto' or 'none'")
        refuse_unknown(choice, {"type", "disable_parallel_tool_use"}, "tool_choice")
        if choice.raw("type") != "none":
            chat.tools = tools
        chat.messages += _read_system(fields)
        _read_messages(fields, chat)
        top_k = fields.optional_integer("top_k", least=0, most=_INT32)
        return cls(
            model=fields.text("model", longest=4096),
            chat=chat,
            parallel=not choice.flag("disable_parallel_tool_use", False),
            max_tokens=None if count else fields.integer("max_tokens", least=1, most=_INT32),
            temperature=fields.number("temperature", 1.0, least=0.0),
            top_p=read_top_p(fields),
            top_k=-1 if top_k is None else top_k,
            stop=read_stops(fields, "stop_sequences"),
            stream=fields.flag("stream", False),
        )

    async def prompt(self, target: Target) -> Prompt:
        return await self.chat.prompt(target, go_on=self.chat.messages[-1]["role"] == "assistant")

    def wanted(self, target: Target, prompt: Prompt) -> Wanted:
        return Wanted(
            marks=target.tokenizer.dialect.marks(tools=bool(self.chat.tools)),
            prompts=[prompt],
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop,
        )


def _check_labels(fields: Fields) -> None:
    """What says who asks, and where a prefix ends that shall be cached, which every one is."""
    if (metadata := fields.optional_child("metadata")) is not None:
        refuse_unknown(metadata, {"user_id"}, "metadata")
        metadata.optional_text("user_id")
    fields.optional_child("cache_control")


def _read_thinking(fields: Fields, chat: Chat) -> None:
    chat.thinking = False
    thinking = fields.optional_child("thinking")
    if thinking is None:
        return
    kind = thinking.text("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise thinking.error("type", "must be 'enabled', 'adaptive' or 'disabled'")
    refuse_unknown(thinking, {"type", "budget_tokens", "display"}, "thinking")
    refuse_unless(thinking, "display", "summarized")
    thinking.optional_integer("budget_tokens", least=1)
    chat.thinking, chat.adaptive = kind != "disabled", kind == "adaptive"


def _read_tools(fields: Fields) -> list[dict[str, Any]]:
    tools: list[dict[str, Any]] = []
    for place, item in enumerate(fields.array("tools")):
        tool = Fields(item, f"tools[{place}]")
        refuse_unless(tool, "type", "custom")
        known = {"type", "name", "description", "input_schema", "cache_control"}
        usual = {"strict": False, "defer_loading": False, "allowed_callers": ["direct"]}
        usual |= {"eager_input_streaming": False, "input_examples": []}
        refuse_unknown(tool, known | set(usual), "tools")
        for name, value in usual.items():
            refuse_unless(tool, name, value)
        function: dict[str, Any] = {"name": read_name(tool, "name", tools)}
        if (description := tool.raw("description")) is not None:
            if not isinstance(description, str):
                raise tool.error("description", "must be a text")
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
    return "\n".join(_read_text(block) for block in _blocks(fields, name))


def _blocks(fields: Fields, name: str) -> list[Fields]:
    where = f"{fields.where}.{name}".lstrip(".")
    return [Fields(block, f"{where}[{i}]") for i, block in enumerate(fields.array(name))]


def _read_text(block: Fields, *, images: bool = False) -> str:
    kind = block.raw("type")
    if kind != "text":
        offered = "'text' or 'image'" if images else "'text'"
        raise block.error("type", f"{str(kind)[:40]!r} is not offered by this server here; use {offered}")
    refuse_unknown(block, {"type", "text", "cache_control", "citations"}, "blocks")
    refuse_unless(block, "citations", [])
    text = block.raw("text")
    if not isinstance(text, str):
        raise block.error("text", "must be a text")
    return text


def _read_part(block: Fields) -> str | Picture:
    if block.raw("type") != "image":
        return _read_text(block, images=True)
    refuse_unknown(block, {"type", "source", "cache_control", "transformations"}, "images")
    refuse_unless(block, "transformations", {})
    source = block.child("source")
    if source.raw("type") != "base64":
        raise source.error("type", "must be 'base64'; this server fetches no images and keeps no files")
    refuse_unknown(source, {"type", "media_type", "data"}, "images")
    data = source.raw("data")
    if not isinstance(data, str):
        raise source.error("data", "must be a text: the image's bytes in base64")
    return read_picture(source, "data", source.text("media_type"), data)


def _read_messages(fields: Fields, chat: Chat) -> None:
    first = len(chat.messages)
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
            said = [{"role": role, "content": content}]
        else:
            blocks = _blocks(message, "content")
            said = _read_assistant(blocks) if role == "assistant" else _read_user(blocks, chat)
        for each in said:
            chat.add(each)
    if len(chat.messages) == first:
        raise fields.error("messages", "must have at least one message with content")


def _read_user(blocks: list[Fields], chat: Chat) -> list[dict[str, Any]]:
    """Results of tools are messages of their own, and stand before what the user says beside."""
    found: list[dict[str, Any]] = []
    said: list[str | Picture] = []
    for block in blocks:
        if block.raw("type") != "tool_result":
            said.append(_read_part(block))
            continue
        if said:
            found.append({"role": "user", "content": chat.content(said)})
            said = []
        known = {"type", "tool_use_id", "content", "is_error", "cache_control"}
        refuse_unknown(block, known, "tool results")
        wrong = "Error: " if block.flag("is_error", False) else ""
        content = block.raw("content")
        if content is None or isinstance(content, str):
            parts: list[str | Picture] = [wrong + (content or "")]
        else:
            parts = [_read_part(part) for part in _blocks(block, "content")]
            if wrong:
                first = parts.pop(0) if parts and isinstance(parts[0], str) else ""
                parts.insert(0, f"{wrong}{first}")
        found.append(
            {"role": "tool", "tool_call_id": block.text("tool_use_id"), "content": chat.content(parts)}
        )
    if said:
        found.append({"role": "user", "content": chat.content(said)})
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
            refuse_unless(block, "caller", {"type": "direct"})
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
