"""Tool calls and thoughts out of a text that comes in pieces of any size."""

from __future__ import annotations

import json

import pytest

from tinsmith.text.dialect import Dialect
from tinsmith.text.parts import Part, Reader, Thought, ToolCall
from tinsmith.text.thinking import Thinking
from tinsmith.text.tool_calls import format_of

TOOLS = {
    "f": {
        "a": {"type": "array"},
        "n": {"type": "integer"},
        "x": {"type": "number"},
        "b": {"type": "boolean"},
        "s": {"type": "string"},
        "o": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "e": {"enum": ["1", "2"]},
        "d": {"type": "object"},
    }
}
F, G = ToolCall("f", '{"a": [1]}'), ToolCall("g", "{}")


def in_pieces(reader: Reader, text: str, size: int) -> list[Part]:
    found: list[Part] = []
    for at in range(0, len(text), size):
        found += reader.feed(text[at : at + size])
    found += reader.rest()
    merged: list[Part] = []
    for part in found:
        if merged and isinstance(part, str) and isinstance(merged[-1], str):
            merged[-1] += part
        elif merged and isinstance(part, Thought) and isinstance(merged[-1], Thought):
            merged[-1] = Thought(merged[-1].text + part.text)
        else:
            merged.append(part)
    return merged


HERMES = "tools: <tool_call>{...}</tool_call>"
LLAMA = '<|start_header_id|> respond with {"name": function name, "parameters": dictionary}'
DEEPSEEK = "<｜tool▁{}｜>".format
KIMI = "<|tool_call_begin|>"
NEMOTRON = "<TOOLCALL>[...]</TOOLCALL>"
MISTRAL = "[TOOL_CALLS]"
LFM = "<|tool_list_start|>"
OLMO = "<function_calls>"
CODER = "<tool_call>\n<function=name>\n<parameter=name>"
GLM = "<tool_call>{name}\n<arg_key>"
HARMONY = "<|start|>system<|message|><|channel|>"

LLAMA_F = '{"name": "f", "parameters": {"a": [1]}}'
SEP = DEEPSEEK("sep")


def deepseek(*calls: str) -> str:
    begin, end = DEEPSEEK("call▁begin"), DEEPSEEK("call▁end")
    inner = "\n".join(f"{begin}{call}{end}" for call in calls)
    return DEEPSEEK("calls▁begin") + inner + DEEPSEEK("calls▁end")


def kimi(*calls: str) -> str:
    inner = "".join(f"<|tool_call_begin|>{call}<|tool_call_end|>" for call in calls)
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


def coder(name: str, **arguments: str) -> str:
    lines = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{lines}</function>\n</tool_call>"


def glm(name: str, **arguments: str) -> str:
    pairs = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in arguments.items()
    )
    return f"<tool_call>{name}\n{pairs}</tool_call>"


ARG = "<|tool_call_argument_begin|>"
CASES = [
    (HERMES, "no call, 1 < 2", ["no call, 1 < 2"]),
    (
        HERMES,
        'so:<tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>'
        ' <tool_call>{"name":"g"}</tool_call>',
        ["so:", F, G],
    ),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": [1]}"}</tool_call>\n', [F]),
    (HERMES, "<tool_call>not JSON</tool_call>", ["<tool_call>not JSON</tool_call>"]),
    (HERMES, '<tool_call>{"name": 5}</tool_call>', ['<tool_call>{"name": 5}</tool_call>']),
    (HERMES, '<tool_call>{"name": "f"', ['<tool_call>{"name": "f"']),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', [...]),
    (LLAMA, LLAMA_F, [F]),
    (LLAMA, f'<|python_tag|>{LLAMA_F}; {{"name": "g", "parameters": {{}}}}', [F, G]),
    (LLAMA, "Hello {", ["Hello {"]),
    (LLAMA, '{"city": 1}', ['{"city": 1}']),
    (LLAMA, '{"name": "f", "parameters": {}} and text', ['{"name": "f", "parameters": {}} and text']),
    (DEEPSEEK("call▁begin"), "so:" + deepseek(f'function{SEP}f\n```json\n{{"a": [1]}}\n```'), ["so:", F]),
    (DEEPSEEK("call▁begin"), deepseek(f'f{SEP}{{"a": [1]}}', f"g{SEP}{{}}"), [F, G]),
    (KIMI, "ok" + kimi(f'functions.f:0{ARG}{{"a": [1]}}', f"functions.g:1{ARG}{{}}"), ["ok", F, G]),
    (KIMI, "<|tool_call_begin|>odd<|tool_call_end|>", ["<|tool_call_begin|>odd<|tool_call_end|>"]),
    (
        NEMOTRON,
        'hm <TOOLCALL>[{"name": "f", "arguments": {"a": [1]}}, {"name": "g", "arguments": {}}]</TOOLCALL>\n',
        ["hm", F, G],
    ),
    (NEMOTRON, '<TOOLCALL>[{"name": "f"}, 5]</TOOLCALL>', ['<TOOLCALL>[{"name": "f"}, 5]</TOOLCALL>']),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1]}}, {"name": "g"}]', [F, G]),
    (MISTRAL, 'ok [TOOL_CALLS]f[ARGS]{"a": [1]}[TOOL_CALLS]g[ARGS]{}', ["ok", F, G]),
    (MISTRAL, '[TOOL_CALLS]f[CALL_ID]a1b2c3d4e[ARGS]{"a": [1]}', [F]),
    (MISTRAL, "[TOOL_CALLS]nothing", ["[TOOL_CALLS]nothing"]),
    (LFM, "<|tool_call_start|>[f(a=[1]), g()]<|tool_call_end|>ok", [F, G, "ok"]),
    (LFM, '<|tool_call_start|>[{"name": "f", "arguments": {"a": [1]}}]<|tool_call_end|>', [F]),
    (LFM, "<|tool_call_start|>[f(1)]<|tool_call_end|>", ["<|tool_call_start|>[f(1)]<|tool_call_end|>"]),
    (LFM, "<|tool_call_start|>[f(a=open('x'))]<|tool_call_end|>", [...]),
    (
        OLMO,
        '<function_calls>\nf(a=[true, null, "x"], b={"c": 1.5})\ng()\n</function_calls>',
        [ToolCall("f", '{"a": [true, null, "x"], "b": {"c": 1.5}}'), G],
    ),
    (CODER, "So.\n\n" + coder("f", a="[1]") + "\n" + coder("g"), ["So.", F, G]),
    (CODER, coder("f", s="5", o="null", e="1", n="7", b="True", x="2"), [
        ToolCall("f", '{"s": "5", "o": null, "e": "1", "n": 7, "b": true, "x": 2}')
    ]),
    (CODER, coder("f", d="{'k': [None, 'v']}", n="many", unknown="12"), [
        ToolCall("f", '{"d": {"k": [null, "v"]}, "n": "many", "unknown": "12"}')
    ]),
    (CODER, coder("f", s=" two\nlines</parameter> and so "), [
        ToolCall("f", '{"s": " two\\nlines</parameter> and so "}')
    ]),
    # Without the tag around it, as some models write it.
    (CODER, "<function=f>\n<parameter=a>\n[1]\n</parameter>\n</function>", [F]),
    (CODER, "<function=f>\n<parameter=a>\n[1]\n</function>", [...]),
    (GLM, "Let me.\n" + glm("f", a="[1]") + glm("g"), ["Let me.", F, G]),
    (GLM, "<tool_call>f<arg_key>a</arg_key><arg_value>[1]</arg_value></tool_call>", [F]),
    (GLM, glm("f", s="[1]", n="7.0", unknown="12"), [ToolCall("f", '{"s": "[1]", "n": 7, "unknown": 12}')]),
    (GLM, '<tool_call>{"name": "f"}</tool_call>', ['<tool_call>{"name": "f"}</tool_call>']),
    (
        HARMONY,
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>analysis<|message|>so<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>"
        '{"a": [1]}<|call|>',
        [Thought("hm\nso"), "I look.", F],
    ),
    (HARMONY, ' to=functions.f<|channel|>commentary json<|message|>{"a": [1]}', [F]),  # its end is no text
    (HARMONY, '<|channel|>commentary to=functions.g <|constrain|>json<|message|><|call|>', [G]),
    (HARMONY, "<|channel|>final<|message|>4 < 5<|return|>", ["4 < 5"]),
    (HARMONY, "<|channel|>analysis<|message|>hm<|channel|>final<|message|>yes", [Thought("hm"), "yes"]),
    (HARMONY, "plain <|end|>", ["plain "]),
    (HARMONY, "<|channel|>comm", []),
    (HARMONY, ' to=functions.f<|channel|>commentary json<|message|>{"a": [', ['{"a": [']),
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(("template", "text", "parts"), CASES)
def test_calls_are_found_however_the_text_is_cut(template: str, text: str, parts: list, size: int) -> None:
    found = in_pieces(Dialect.of(template).reader("", TOOLS), text, size)
    assert found == ([text] if parts == [...] or parts == [text] else parts)


@pytest.mark.parametrize("template", [HERMES, KIMI, MISTRAL, LFM, CODER, GLM, HARMONY])
def test_what_is_told_early_is_never_a_part_of_a_mark(template: str) -> None:
    """A stream's text is final: no beginning of a mark may be in what is told before the mark is whole."""
    texts = [text for each, text, parts in CASES if each == template and F in parts]
    for text in texts:
        reader = Dialect.of(template).reader("", TOOLS)
        told = "".join(part for letter in text for part in reader.feed(letter) if isinstance(part, str))
        assert not any(mark in told for mark in "<>[]|")


@pytest.mark.parametrize("size", [7, 100_000])
@pytest.mark.parametrize(
    "mark", ["<|channel|>", "<|start|>", "to=", "<|message|>", "<|call|>", " ", "<think>"]
)
def test_a_model_that_repeats_a_mark_comes_to_an_end(mark: str, size: int) -> None:
    """One that was trained to could otherwise hold up the server, and everybody with it."""
    for template in (HARMONY, f"{HARMONY} <think>", f"{HERMES} <think>"):
        in_pieces(Dialect.of(template).reader("", TOOLS), mark * 3000 + "end", size)


def test_an_answer_ends_with_its_first_call_where_one_is_wanted() -> None:
    text = 'a<tool_call>{"name":"f","arguments":{"a":[1]}}</tool_call><tool_call>{"name":"g"}</tool_call> b'
    reader = Dialect.of(HERMES).reader("", TOOLS, parallel=False)
    assert in_pieces(reader, text, 4) == ["a", F]


def test_calls_are_text_where_no_tools_are_offered() -> None:
    text = '<tool_call>{"name": "f"}</tool_call>'
    assert in_pieces(Dialect.of(HERMES).reader("", None), text, 4) == [text]
    told = in_pieces(Dialect.of(HARMONY).reader("", None), CASES[-8][1], 4)
    assert told == [Thought("hm\nso"), 'I look.{"a": [1]}']


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("text", "begun", "parts"),
    [
        ("answer", False, ["answer"]),
        ("\n<think>\nhm</think>\n\nanswer", False, [Thought("hm"), "answer"]),
        ("hm</think>answer <think>", True, [Thought("hm"), "answer <think>"]),
        ("<think>hm </thi", False, [Thought("hm </thi")]),
        ("<thin", False, ["<thin"]),
    ],
)
def test_thoughts_are_parted_from_the_answer(text: str, begun: bool, parts: list, size: int) -> None:
    assert in_pieces(Thinking(begun=begun), text, size) == parts


def test_thoughts_come_before_calls_and_hold_none() -> None:
    template = f"{HERMES} <think>"
    text = '<think>\n<tool_call>{"name": "g"}</tool_call></think>\n\n<tool_call>{"name": "g"}</tool_call>'
    thought = Thought('<tool_call>{"name": "g"}</tool_call>')
    assert in_pieces(Dialect.of(template).reader("", TOOLS), text, 5) == [thought, G]
    assert in_pieces(Dialect.of(template).reader("<think>\n", TOOLS), text[8:], 5) == [thought, G]
    whole = in_pieces(Dialect.of(template).reader("", None, thoughts=False), text, 5)
    assert whole == [text]


def test_what_a_template_looks_at() -> None:
    template = "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ m.reasoning_effort }}"
    dialect = Dialect.of(template + "{% generation %}'enable_thinking'{% endgeneration %}")
    assert dialect.variables == {"thinking", "m"}
    assert dialect.switch == "thinking"
    assert Dialect.of("{% if %}").variables == frozenset()


def test_formats_between_the_same_tags_are_told_apart() -> None:
    marks = {format_of(template).marks for template in (HERMES, GLM, HARMONY, KIMI, MISTRAL)}  # type: ignore[union-attr]
    assert len(marks) == 5
    assert format_of("{{ messages }}") is None
    assert format_of(None) is None


def call(id_: str, name: str = "f") -> dict:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": {"a": [1]}}}


def result(id_: str) -> dict:
    return {"role": "tool", "tool_call_id": id_, "content": id_}


def test_harmony_gets_each_call_with_its_result_behind_it() -> None:
    asked = {"role": "user", "content": "x"}
    said = {
        "role": "assistant",
        "content": "I look",
        "reasoning_content": "hm",
        "tool_calls": [call("1"), call("2")],
    }
    arranged = Dialect.of(HARMONY).arrange([asked, said, result("2"), result("1")])
    assert [m["role"] for m in arranged] == ["user", "assistant", "tool", "assistant", "tool"]
    assert [m.get("thinking") for m in arranged] == [None, "hm\nI look", None, None, None]
    assert [m["content"] for m in arranged] == ["x", "", "1", "", "2"]
    assert all(len(m.get("tool_calls", [0])) == 1 for m in arranged)
    with pytest.raises(ValueError, match="belongs to no call"):
        Dialect.of(HARMONY).arrange([asked, said, result("3")])


def test_ids_are_those_that_a_family_knows() -> None:
    said = {"role": "assistant", "content": "", "tool_calls": [call("x"), call("y", "g")]}
    later = {"role": "assistant", "content": "", "tool_calls": [call("z")]}
    told = [said, result("y"), result("x"), later, result("z")]
    kimi_ids = Dialect.of(KIMI).arrange(told)
    assert [c["id"] for m in kimi_ids for c in m.get("tool_calls", [])] == [
        "functions.f:0",
        "functions.g:1",
        "functions.f:2",
    ]
    assert [m["tool_call_id"] for m in kimi_ids if m["role"] == "tool"] == [
        "functions.g:1",
        "functions.f:0",
        "functions.f:2",
    ]
    mistral = Dialect.of(MISTRAL).arrange(told)
    ids = [c["id"] for m in mistral for c in m.get("tool_calls", [])]
    assert all(len(id_) == 9 and id_.isalnum() for id_ in ids)
    assert mistral[1]["tool_call_id"] == ids[1]
    assert json.dumps(told) == json.dumps([said, result("y"), result("x"), later, result("z")])
