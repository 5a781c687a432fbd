"""The formats that chat templates ask for tool calls in, and how each reads.

- Hermes, Qwen3: JSON between <tool_call> and </tool_call>
- Qwen3-Coder, Qwen3.5, Nemotron 3: <function=NAME> with a <parameter=NAME> for each argument
- GLM 4: NAME and pairs of <arg_key> and <arg_value> between <tool_call> and </tool_call>
- Llama 3: the whole answer is JSON with `name` and `parameters`
- DeepSeek V3 and R1: a name and JSON in a fence between marks of their own; V3.1: without the fence
- Kimi K2: functions.NAME:NUMBER and JSON
- Nemotron Nano 2 and Super: a list of JSON between <TOOLCALL> and </TOOLCALL>
- Mistral: [TOOL_CALLS] and a list of JSON; later NAME[ARGS]JSON, with [CALL_ID] and an id between
- LFM2, OLMo 3: Python calls between marks
- GPT-OSS: harmony, see harmony.py
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from . import harmony
from .marked import Marked, Whole
from .messages import Message, ids_of_kimi, ids_of_mistral
from .parts import Reader, ToolCall, Tools, call_of, parsed
from .values import pythonic, typed


@dataclass(frozen=True, slots=True)
class Format:
    """How a model's calls look. `marks` are special tokens that have to be in the text; `arrange` makes of a
    conversation what the template writes rightly."""

    reader: Callable[[Tools], Reader]
    marks: tuple[str, ...] = ()
    arrange: Callable[[Sequence[Message]], list[Message]] = list
    thoughts: bool = False  # whether its reader finds these, too


def format_of(template: str | None) -> Format | None:
    """The format that a chat template asks for calls in; None where it is none of these."""
    if template is None:
        return None
    if "<|channel|>" in template and "<|message|>" in template:
        return Format(lambda _: harmony.Harmony(), harmony.MARKS, harmony.arrange, thoughts=True)
    if _DEEPSEEK[0] in template:
        return Format(
            lambda _: Marked(*_DEEPSEEK, _deepseek, _DEEPSEEK_FRAME),
            (*_DEEPSEEK, *_DEEPSEEK_FRAME, _SEPARATOR),
        )
    if _KIMI[0] in template:
        return Format(
            lambda _: Marked(*_KIMI, _kimi, _KIMI_FRAME),
            (*_KIMI, *_KIMI_FRAME, _KIMI_ARGUMENTS),
            ids_of_kimi,
        )
    if _NEMOTRON[0] in template:
        return Format(lambda _: Marked(*_NEMOTRON, _listed), _NEMOTRON)
    if _MISTRAL in template:
        return Format(
            lambda _: Marked(_MISTRAL, None, _mistral), (_MISTRAL, "[CALL_ID]", "[ARGS]"), ids_of_mistral
        )
    if _LFM[0] in template or "<|tool_list_start|>" in template:
        return Format(lambda _: Marked(*_LFM, _lfm), _LFM)
    if _OLMO[0] in template:
        return Format(lambda _: Marked(*_OLMO, pythonic), _OLMO)
    if "<function=" in template:
        return Format(lambda tools: Marked("<function=", "</function>", _Coder(tools), _CALL), _CALL)
    if "<tool_call>" in template:
        if "<arg_key>" in template:
            return Format(
                lambda tools: Marked(*_CALL, _Glm(tools)),
                (*_CALL, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
            )
        return Format(lambda _: Marked(*_CALL, _hermes), _CALL)
    if '"parameters":' in template and "<|start_header_id|>" in template:
        return Format(lambda _: Whole(), ("<|python_tag|>",))
    return None


_CALL = ("<tool_call>", "</tool_call>")
_SEPARATOR = "<\uff5ctool\u2581sep\uff5c>"
_DEEPSEEK = ("<\uff5ctool\u2581call\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581end\uff5c>")
_DEEPSEEK_FRAME = ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>")
_KIMI = ("<|tool_call_begin|>", "<|tool_call_end|>")
_KIMI_FRAME = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
_KIMI_ARGUMENTS = "<|tool_call_argument_begin|>"
_NEMOTRON = ("<TOOLCALL>", "</TOOLCALL>")
_MISTRAL = "[TOOL_CALLS]"
_LFM = ("<|tool_call_start|>", "<|tool_call_end|>")
_OLMO = ("<function_calls>", "</function_calls>")


def _one(call: ToolCall | None) -> list[ToolCall] | None:
    return None if call is None else [call]


def _of_json(value: object) -> ToolCall | None:
    return call_of(value.get("name"), value.get("arguments", {})) if isinstance(value, dict) else None


def _hermes(block: str) -> list[ToolCall] | None:
    return _one(_of_json(parsed(block)))


def _listed(block: str) -> list[ToolCall] | None:
    values = parsed(block)
    calls = [_of_json(value) for value in (values if isinstance(values, list) else [values])]
    found = [call for call in calls if call is not None]
    return found if len(found) == len(calls) else None


_FENCED = re.compile(r"\s*```json\s*\n(.*?)\n?\s*```\s*", re.DOTALL)


def _deepseek(block: str) -> list[ToolCall] | None:
    first, mark, rest = block.partition(_SEPARATOR)
    if not mark:
        return None
    if first.strip() != "function":
        return _one(call_of(first.strip(), rest))
    name, _, body = rest.partition("\n")
    fenced = _FENCED.fullmatch(body)
    return _one(call_of(name.strip(), fenced[1])) if fenced else None


def _kimi(block: str) -> list[ToolCall] | None:
    head, _, arguments = block.partition(_KIMI_ARGUMENTS)
    named = re.fullmatch(r"\s*functions\.(.+):\d+\s*", head)
    return _one(call_of(named[1], arguments)) if named else None


def _mistral(block: str) -> list[ToolCall] | None:
    head, mark, arguments = block.partition("[ARGS]")
    name, _, _ = head.partition("[CALL_ID]")
    return _one(call_of(name.strip(), arguments)) if mark else _listed(block)


def _lfm(block: str) -> list[ToolCall] | None:
    return _listed(block) or pythonic(block)


_END = re.compile(r"\s*\Z")


def _written(
    pattern: re.Pattern[str], text: str, schemas: Mapping[str, object], *, unknown: bool
) -> dict[str, object] | None:
    """Arguments that are written one behind the other, each as `pattern`'s name and value; None where
    something else is among them. unknown: whether what has no schema may be JSON."""
    arguments: dict[str, object] = {}
    at = 0
    while not _END.match(text, at):
        found = pattern.match(text, at)
        if found is None:
            return None
        key = found[1].strip()
        arguments[key] = typed(found[2], schemas.get(key), unknown=unknown)
        at = found.end()
    return arguments


class _Coder:
    """`NAME>` and its parameters, each between <parameter=NAME> and </parameter>, on lines of its own."""

    _PARAMETER = re.compile(
        r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>(?=\s*(?:<parameter=|$))", re.DOTALL
    )

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def __call__(self, block: str) -> list[ToolCall] | None:
        name, mark, body = block.partition(">")
        if not mark:
            return None
        arguments = _written(self._PARAMETER, body, self._tools.get(name.strip(), {}), unknown=False)
        return None if arguments is None else _one(call_of(name.strip(), arguments))


class _Glm:
    """NAME and pairs of <arg_key> and <arg_value>: texts as they are, everything else as JSON."""

    _PAIR = re.compile(
        r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>(?=\s*(?:<arg_key>|$))", re.DOTALL
    )

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    def __call__(self, block: str) -> list[ToolCall] | None:
        start = block.find("<arg_key>")
        name = block[: start if start >= 0 else len(block)].strip()
        pairs = block[start:] if start >= 0 else ""
        arguments = _written(self._PAIR, pairs, self._tools.get(name, {}), unknown=True)
        if arguments is None or "\n" in name or name.startswith("{"):
            return None
        return _one(call_of(name, arguments))
