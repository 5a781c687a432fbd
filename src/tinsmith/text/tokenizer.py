"""A model's tokenizer and chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .dialect import Dialect
from .messages import MessageError, with_text_arguments


class TextError(ValueError):
    """What cannot be made of a text; the message says why."""


def is_unicode(text: str) -> bool:
    """Whether a text consists of characters: JSON can write halves of surrogate pairs alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Tokenizer:
    """Text to token ids and back. Its methods may be called from any thread."""

    def __init__(self, tokenizer: Any, context: int | None = None) -> None:
        """`context`: how many tokens a text may have; much longer ones are refused without being encoded."""
        self._tokenizer = tokenizer
        # Encoding by transformers would set truncation on it, which fails while another thread reads from it.
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._context = context
        self._longest = max(map(len, tokenizer.get_vocab()), default=1)  # characters of a token
        self._bytes: dict[int, bytes] = {}
        special = {id_: tokenizer.convert_ids_to_tokens(id_) for id_ in tokenizer.all_special_ids}
        special |= {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special: dict[int, str] = special
        template = tokenizer.chat_template
        templates = template if isinstance(template, dict) else {"default": template}
        self.template: str | None = templates.get("default") or templates.get("tool_use")
        self._tool_template: str | None = templates.get("tool_use") or self.template
        self.dialect = Dialect.of(self._tool_template)

    @classmethod
    def load(cls, folder: str, context: int | None = None) -> Tokenizer:
        """The tokenizer of a model's folder. Takes half a second, most of it transformers' import. Raises
        TextError."""
        if not (Path(folder) / "tokenizer.json").is_file():
            raise TextError(f"the model in {folder} has no tokenizer.json; send token ids by the Tinker API")
        from transformers import PreTrainedTokenizerFast

        try:
            return cls(PreTrainedTokenizerFast.from_pretrained(folder), context)
        except Exception as error:  # whatever a folder may hold
            raise TextError(f"no tokenizer could be loaded from {folder}: {error}"[:400]) from error

    def encode(self, text: str) -> list[int]:
        """Token ids, with those that the tokenizer puts at a text's beginning. Raises TextError."""
        if not is_unicode(text):
            raise TextError("holds half of a surrogate pair, which is no character")
        return self._encode(text, special=True)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        # Twice as many characters as they could be: a normalizer may take some away.
        if self._context is not None and len(text) > 2 * self._context * self._longest:
            raise TextError(
                f"has {len(text)} characters, which are more than the {self._context} tokens of this model's"
                " context; shorten it"
            )
        ids: list[int] = self._backend.encode(text, add_special_tokens=special).ids
        return ids

    def knows(self, variable: str) -> bool:
        """Whether the chat template looks at a variable."""
        return variable in self.dialect.variables

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        options: Mapping[str, Any],
        *,
        go_on: bool = False,
    ) -> list[int]:
        """Token ids of a conversation by the model's chat template, up to where the answer begins; with
        `go_on` the last message is the answer's beginning. Raises TextError."""
        if self.template is None:
            raise TextError("this model has no chat template; use /completions")
        try:
            arranged = self.dialect.arrange(messages)
        except MessageError as error:
            raise TextError(str(error)) from None
        reason: Exception | None = None
        for written, offered in _ways(arranged, tools or ()):
            try:
                text: str = self._tokenizer.apply_chat_template(
                    written,
                    tools=offered or None,
                    chat_template=self._tool_template if offered else self.template,
                    add_generation_prompt=not go_on,
                    continue_final_message=go_on,
                    tokenize=False,
                    **options,
                )
            except Exception as error:  # templates raise what they like
                reason = reason or error
            else:
                return self._encode(text, special=False)
        why = " ".join(str(reason).split())[:300]
        raise TextError(f"the model's chat template does not take this: {why}") from reason

    def decode(self, ids: Sequence[int], *, marks: tuple[str, ...] | None = ()) -> str:
        """The text of some tokens, of special ones only with those in `marks`, or with all of them where that
        is None. Bytes that are no character are U+FFFD."""
        if marks:
            ids = [id_ for id_ in ids if (name := self._special.get(id_)) is None or name in marks]
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=marks == ())
        return text

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for; where it is part of a character, its bytes."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._token_bytes(token)
        return found

    def _token_bytes(self, token: int) -> bytes:
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        if "\ufffd" not in text:
            return bytes(text.encode())
        raw = self._tokenizer.convert_ids_to_tokens(token) or ""
        if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", raw):
            return bytes([int(match[1], 16)])
        if all(character in _BYTES for character in raw):
            return bytes(_BYTES[character] for character in raw)
        return bytes(text.encode())

    def token_text(self, token: int) -> str:
        """A token as text; one that is part of a character as its bytes: `bytes:\\xe2\\x82`."""
        raw = self.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _ways(
    messages: list[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]]:
    """How a conversation may be told to a template, the usual way first: some put arguments together with
    text, some expect of each function all that it can have."""
    conversations = [messages]
    if any(message.get("tool_calls") for message in messages):
        conversations.append(with_text_arguments(messages))
    offers = [list(tools)]
    if any(not {"description", "parameters"} <= set(tool["function"]) for tool in tools):
        empty = {"description": "", "parameters": {"type": "object", "properties": {}}}
        offers.append([{**tool, "function": {**empty, **tool["function"]}} for tool in tools])
    return [(conversation, offer) for offer in offers for conversation in conversations]


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level vocabularies write bytes (GPT-2)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in shown}
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    table.update({chr(256 + i): byte for i, byte in enumerate(hidden)})
    return table


_BYTES = _byte_alphabet()


class Detokenizer:
    """A text token by token. What it has given out never changes, and never ends within a character."""

    def __init__(self, tokenizer: Tokenizer, *, marks: tuple[str, ...] | None = ()) -> None:
        self._decode = partial(tokenizer.decode, marks=marks)
        self._ids: list[int] = []
        # Some tokens before the new ones are decoded with them: how one reads may depend on its neighbours.
        self._before = self._given = 0

    def feed(self, ids: Sequence[int]) -> str:
        """The text that is complete now and was not before."""
        self._ids += ids
        old, new = self._texts()
        if new.endswith("\ufffd"):
            return ""
        self._before, self._given = self._given, len(self._ids)
        return new[len(old) :]

    def rest(self) -> str:
        """What is left at the end, where the last character may be incomplete."""
        old, new = self._texts()
        self._before = self._given = len(self._ids)
        return new[len(old) :]

    def _texts(self) -> tuple[str, str]:
        return self._decode(self._ids[self._before : self._given]), self._decode(self._ids[self._before :])
