"""Reading JSON objects field by field, with errors that name the field and what would be right.

Unknown fields are ignored: clients of other versions send more than this one knows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import cast

from .errors import WireError

_SHOWN = 60  # characters of a wrong value that an error repeats


def parse_object(body: bytes, *, halves: bool = False) -> Fields:
    """The JSON object in `body`. With `halves` its texts may have halves of surrogate pairs."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError("body", f"is no valid JSON ({str(error)[:120]})") from None
    if not halves and (b"\\ud" in body or b"\\uD" in body):
        _refuse_halves(value)
    return Fields(value)


def _refuse_halves(value: object) -> None:
    """Half of a surrogate pair is no character, and cannot be stored; the field that has one is named."""
    for name, item in value.items() if isinstance(value, dict) else [("body", value)]:
        try:
            json.dumps([name, item], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            shown = name.encode(errors="backslashreplace").decode()
            raise WireError(shown, "has a lone surrogate, which no text may have") from None


class Fields:
    """One JSON object on its way to becoming a request."""

    def __init__(self, value: object, where: str = "") -> None:
        if not isinstance(value, dict):
            raise WireError(where or "body", "must be a JSON object")
        self._values = cast(dict[str, object], value)
        self._where = where

    @property
    def where(self) -> str:
        """What errors call this object; nothing for a whole body."""
        return self._where

    def error(self, name: str, problem: str) -> WireError:
        return WireError(f"{self._where}.{name}" if self._where else name, problem)

    def raw(self, name: str) -> object:
        """The value as it came; None where there is none."""
        return self._values.get(name)

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def _wrong(self, name: str, wanted: str) -> WireError:
        value = self._values.get(name)
        if value is None:
            return self.error(name, f"is missing; it must be {wanted}")
        return self.error(name, f"must be {wanted}, not {_show(value)}")

    def text(self, name: str, *, longest: int = 1024) -> str:
        value = self._values.get(name)
        if not isinstance(value, str) or not value:
            raise self._wrong(name, "a text that is not empty")
        if len(value) > longest:
            raise self.error(name, f"has {len(value)} characters; at most {longest} are allowed")
        if not _is_storable(value):
            raise self.error(name, "has a NUL or a lone surrogate, which no text may have")
        return value

    def optional_text(self, name: str, *, longest: int = 1024) -> str | None:
        return self.text(name, longest=longest) if self.has(name) else None

    def integer(self, name: str, *, least: int = -(2**63), most: int = 2**63 - 1) -> int:
        value = self._values.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._wrong(name, _integer_range(least, most))
        return value

    def optional_integer(self, name: str, *, least: int = -(2**63), most: int = 2**63 - 1) -> int | None:
        return self.integer(name, least=least, most=most) if self.has(name) else None

    def number(
        self,
        name: str,
        default: float,
        *,
        least: float = -math.inf,
        below: float = math.inf,
        most: float = math.inf,
    ) -> float:
        """A finite number with `least` <= number <= `most` and number < `below`."""
        if not self.has(name):
            return default
        value = self._values[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number")
        try:
            number = float(value)
        except OverflowError:
            raise self._wrong(name, "a finite number") from None
        if not math.isfinite(number):
            raise self._wrong(name, "a finite number")
        if number < least or number >= below or number > most:
            wanted = [f"at least {least:g}"] if math.isfinite(least) else []
            wanted += [f"less than {below:g}"] if math.isfinite(below) else []
            wanted += [f"at most {most:g}"] if math.isfinite(most) else []
            raise self._wrong(name, " and ".join(wanted))
        return number

    def flag(self, name: str, default: bool) -> bool:
        if not self.has(name):
            return default
        value = self._values[name]
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def child(self, name: str) -> Fields:
        if not isinstance(self._values.get(name), dict):
            raise self._wrong(name, "a JSON object")
        return Fields(self._values[name], f"{self._where}.{name}" if self._where else name)

    def optional_child(self, name: str) -> Fields | None:
        return self.child(name) if self.has(name) else None

    def integers(self, name: str, *, least: int = -(2**63), most: int = 2**63 - 1) -> list[int]:
        """A JSON array of integers."""
        for value in self.array(name):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise self.error(name, f"must be a JSON array, each value {_integer_range(least, most)}")
        return cast(list[int], self.array(name))

    def array(self, name: str) -> list[object]:
        value = self._values.get(name)
        if not isinstance(value, list):
            raise self._wrong(name, "a JSON array")
        return cast(list[object], value)

    def metadata(self, name: str, *, most: int = 64 * 1024) -> dict[str, object] | None:
        """An object that is only kept for its sender."""
        if not self.has(name):
            return None
        value = self._values[name]
        if not isinstance(value, dict):
            raise self._wrong(name, "a JSON object")
        if len(json.dumps(value)) > most:
            raise self.error(name, f"is larger than {most} bytes as JSON")
        if not _is_storable(json.dumps(value, ensure_ascii=False).replace("\\u0000", "\0")):
            raise self.error(name, "has a NUL or a lone surrogate, which no text may have")
        return cast(dict[str, object], value)

    def text_metadata(self, name: str) -> dict[str, str] | None:
        """As `metadata`, where every value is a text."""
        value = self.metadata(name)
        if value is None:
            return None
        for key, item in value.items():
            if not isinstance(item, str):
                raise self.error(f"{name}.{key}", f"must be a text, not {_show(item)}")
        return cast(dict[str, str], value)

    def values(self) -> Mapping[str, object]:
        return self._values


def _integer_range(least: int, most: int) -> str:
    if most < 2**63 - 1:
        return f"an integer from {least} to {most}"
    if least > -(2**63):
        return f"an integer of at least {least}"
    return "an integer"


def _is_storable(text: str) -> bool:
    """Whether a database takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _show(value: object) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    except RecursionError:
        text = "what is nested as deeply"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
