"""Arguments that are written as bare text, and calls that are written as Python: to JSON values."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Mapping
from typing import Any

from .parts import ToolCall, call_of, parsed

_MOST = 1 << 16  # characters that Python's parser is given
_NAMES = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def typed(text: str, schema: object, *, unknown: bool) -> object:
    """A bare text as the type that its JSON schema asks for; as it is where it cannot be that. Where the
    schema says nothing, `unknown` decides whether JSON is read."""
    types = _types_of(schema)
    if types == {"string"} or (not types and not unknown):
        return text
    value = _value(text.strip())
    if value is _NOTHING or (isinstance(value, str) and "string" in types):
        return text
    if not types:
        return value
    if "integer" in types and isinstance(value, float) and value.is_integer():
        value = int(value)
    allowed = tuple(t for name in types for t in _TYPES.get(name, ()))
    if not isinstance(value, allowed) or (isinstance(value, bool) and "boolean" not in types):
        return text
    return value


_NOTHING = object()


def _value(text: str) -> object:
    """JSON, or what Python writes for it."""
    if text == "null":
        return None
    if (value := parsed(text)) is not None:
        return value
    if len(text) > _MOST:
        return _NOTHING
    try:
        value = _literal(_parse(text, "eval").body)
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return _NOTHING
    return value


def _types_of(schema: object) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    found: set[str] = set()
    kind = schema.get("type")
    found.update([kind] if isinstance(kind, str) else [k for k in kind or () if isinstance(k, str)])
    for name in ("anyOf", "oneOf"):
        options = schema.get(name)
        for option in options if isinstance(options, list) else ():
            if isinstance(option, Mapping) and isinstance(option.get("type"), str):
                found.add(option["type"])
    values = schema.get("enum")
    if not found and isinstance(values, list) and values and all(isinstance(v, str) for v in values):
        found.add("string")
    return found


def pythonic(text: str) -> list[ToolCall] | None:
    """Calls in Python: `f(a="x", b=[1])`, several in a list or a line each. JSON's constants go, too."""
    if len(text) > _MOST:
        return None
    try:
        lines = _parse(text.strip(), "exec").body
        body = [line.value for line in lines if isinstance(line, ast.Expr)]
        if not body or len(body) < len(lines):
            return None
        nodes = body[0].elts if len(body) == 1 and isinstance(body[0], ast.List) else body
        return [_call(node) for node in nodes]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _parse(text: str, mode: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model's odd escapes are nothing for the log
        return ast.parse(text, mode=mode)


def _call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError
        arguments[keyword.arg] = _literal(keyword.value)
    call = call_of(ast.unparse(node.func), arguments)
    if call is None:
        raise ValueError
    return call


def _literal(node: ast.expr) -> object:
    match node:
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _literal(value) for key, value in zip(keys, values, strict=True)}
        case _:
            return ast.literal_eval(node)


def _key(node: ast.expr | None) -> str:
    key = _literal(node) if node is not None else None
    if not isinstance(key, str):
        raise ValueError
    return key
