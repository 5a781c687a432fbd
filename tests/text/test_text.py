"""Tokens to text without a cut character, tool calls and thoughts out of pieces of text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tinsmith
from tinsmith.text.thinking import Thinking, Thought
from tinsmith.text.tokenizer import Detokenizer, TextError, Tokenizer
from tinsmith.text.tool_calls import ToolCall, ToolCalls, format_of

MODEL = Path(tinsmith.__file__).parent / "assets" / "models" / "tin-5m"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.load(str(tiny_model))


def test_loading_and_using_a_tokenizer_brings_no_torch() -> None:
    code = (
        "from tinsmith.text.tokenizer import Tokenizer; import sys; before = 'transformers' in sys.modules;"
        f"t = Tokenizer.load({str(MODEL)!r}); t.chat([dict(role='user', content='x')], None, {{}});"
        "t.decode(t.encode('x')); print(before, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]


def test_no_character_is_cut(tokenizer: Tokenizer) -> None:
    text = "Köln 東京 🙂🙂 e\u0301"
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.feed([id_]) for id_ in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces.count("🙂") == 2


def test_what_is_no_character_comes_once_that_is_certain(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    smile, letter = tokenizer.encode("🙂")[:2], tokenizer.encode("a")
    assert detokenizer.feed(smile) == ""
    assert detokenizer.feed(letter) == "\ufffda"
    assert detokenizer.feed(smile) == ""
    assert detokenizer.rest() == "\ufffd"


def test_a_tokens_bytes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("€a")
    assert [tokenizer.token_bytes(id_) for id_ in ids] == [b"\xe2", b"\x82", b"\xac", b"a"]
    assert [tokenizer.token_text(id_) for id_ in ids[2:]] == ["bytes:\\xac", "a"]


def test_half_a_surrogate_pair_is_no_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(TextError):
        tokenizer.encode("\ud800")


def in_pieces(parser: ToolCalls | Thinking, text: str, size: int) -> list:
    found: list = []
    for at in range(0, len(text), size):
        found += parser.feed(text[at : at + size])
    found += parser.rest()
    merged: list = []
    for part in found:
        if merged and isinstance(part, str) and isinstance(merged[-1], str):
            merged[-1] += part
        elif merged and isinstance(part, Thought) and isinstance(merged[-1], Thought):
            merged[-1] = Thought(merged[-1].text + part.text)
        else:
            merged.append(part)
    return merged


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("no call, 1 < 2", ["no call, 1 < 2"]),
        (
            'so:<tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>'
            ' <tool_call>{"name":"g"}</tool_call>',
            ["so:", ToolCall("f", '{"a": [1]}'), " ", ToolCall("g", "{}")],
        ),
        (
            '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
            [ToolCall("f", '{"a": 1}')],
        ),
        ("<tool_call>not JSON</tool_call>", ["<tool_call>not JSON</tool_call>"]),
        ('<tool_call>{"name": 5}</tool_call>', ['<tool_call>{"name": 5}</tool_call>']),
        ('<tool_call>{"name": "f"', ['<tool_call>{"name": "f"']),
    ],
)
def test_tool_calls_are_found_however_the_text_is_cut(text: str, parts: list, size: int) -> None:
    assert in_pieces(parser_of("<tool_call>"), text, size) == parts


def parser_of(template: str) -> ToolCalls:
    found = format_of(template)
    assert found is not None
    return found.parser()


LLAMA_F = '{"name": "f", "parameters": {"a": [1]}}'
LLAMA = '<|start_header_id|> respond with {"name": function name, "parameters": dictionary}'
DEEPSEEK = "<｜tool▁{}｜>".format
KIMI = "<|tool_call_begin|>"
F, G = ToolCall("f", '{"a": [1]}'), ToolCall("g", "{}")


def deepseek(*calls: str) -> str:
    begin, end = DEEPSEEK("call▁begin"), DEEPSEEK("call▁end")
    inner = "\n".join(f"{begin}{call}{end}" for call in calls)
    return DEEPSEEK("calls▁begin") + inner + DEEPSEEK("calls▁end")


SEP = DEEPSEEK("sep")
KIMI_TEXT = (
    "ok<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
    '{"a": [1]}<|tool_call_end|><|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>{}'
    "<|tool_call_end|>"
    "<|tool_calls_section_end|>"
)


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    ("template", "text", "parts"),
    [
        (LLAMA, LLAMA_F, [F]),
        (LLAMA, f'<|python_tag|>{LLAMA_F}; {{"name": "g", "parameters": {{}}}}', [F, G]),
        (LLAMA, "Hello {", ["Hello {"]),
        (LLAMA, '{"city": 1}', ['{"city": 1}']),
        (LLAMA, '{"name": "f", "parameters": {}} and text', ['{"name": "f", "parameters": {}} and text']),
        (DEEPSEEK("call▁begin"), "so:" + deepseek(f'function{SEP}f\n```json\n{{"a": [1]}}\n```'), ["so:", F]),
        (DEEPSEEK("call▁begin"), deepseek(f'f{SEP}{{"a": [1]}}', f"g{SEP}{{}}"), [F, "\n", G]),
        (KIMI, KIMI_TEXT, ["ok", F, G]),
        (KIMI, "<|tool_call_begin|>odd<|tool_call_end|>", ["<|tool_call_begin|>odd<|tool_call_end|>"]),
    ],
)  # fmt: skip
def test_other_formats_are_read_too(template: str, text: str, parts: list, size: int) -> None:
    assert in_pieces(parser_of(template), text, size) == parts


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


def test_formats_between_the_same_tags_are_told_apart() -> None:
    assert format_of("... <tool_call>{...}") is not None
    for other in ("<tool_call><function=f>", "<tool_call>{{ arg_key }}", "{{ messages }}", None):
        assert format_of(other) is None


def test_special_tokens_are_text_where_they_are_wanted(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("a"), *tokenizer.encode("<think>"), *tokenizer.encode("b")]
    for special, text in ((False, "ab"), (True, "a<think>b")):
        detokenizer = Detokenizer(tokenizer, special=special)
        assert "".join(detokenizer.feed([id_]) for id_ in ids) + detokenizer.rest() == text
