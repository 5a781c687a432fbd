"""Tokens to text without a cut character, and back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import tinsmith
from tinsmith.text.tokenizer import Detokenizer, TextError, Tokenizer

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


def test_a_template_for_tools_is_taken_where_there_are_some() -> None:
    folder = PreTrainedTokenizerFast.from_pretrained(MODEL)
    folder.chat_template = {
        "default": "plain",
        "tool_use": "{% for tool in tools %}tools{% endfor %}",
    }
    tokenizer = Tokenizer(folder)
    said, tool = [{"role": "user", "content": "x"}], {"type": "function", "function": {"name": "f"}}
    assert tokenizer.decode(tokenizer.chat(said, None, {})) == "plain"
    assert tokenizer.decode(tokenizer.chat(said, [tool], {})) == "tools"


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


def test_a_text_far_beyond_the_context_is_refused_without_encoding_it() -> None:
    tokenizer = Tokenizer.load(str(MODEL), 10)
    assert len(tokenizer.encode("x " * 100)) > 10  # whether it fits exactly is for others to say
    with pytest.raises(TextError, match="more than the 10 tokens"):
        tokenizer.encode("x" * 10_000)
    with pytest.raises(TextError, match="more than the 10 tokens"):
        tokenizer.chat([{"role": "user", "content": "x" * 10_000}], None, {})


def test_half_a_surrogate_pair_is_no_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(TextError):
        tokenizer.encode("\ud800")


def test_special_tokens_are_text_where_they_are_wanted(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("a"), *tokenizer.encode("<think>"), *tokenizer.encode("b")]
    for marks, text in (((), "ab"), (("</think>",), "ab"), (("<think>",), "a<think>b"), (None, "a<think>b")):
        detokenizer = Detokenizer(tokenizer, marks=marks)
        assert "".join(detokenizer.feed([id_]) for id_ in ids) + detokenizer.rest() == text
