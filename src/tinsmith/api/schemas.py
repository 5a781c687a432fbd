"""JSON Schemas, in few words: what operations.py describes requests and answers with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Schema = dict[str, Any]

# What an id names. A test puts in there what it is not to see; see tests/api/test_isolation.py.
Named = Literal[
    "session", "run", "sampler", "request", "path", "checkpoint", "project", "model", "weights", "upload"
]

INT32 = 2**31 - 1
INT64 = 2**63 - 1

ANY: Schema = {}
STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
TIME: Schema = {"type": "string", "format": "date-time"}


def text(*, longest: int = 1024, **more: object) -> Schema:
    """A text that is not empty."""
    return {"type": "string", "minLength": 1, "maxLength": longest, **more}


def name_of(what: Named, *, longest: int = 1024, **more: object) -> Schema:
    return text(longest=longest, **{"x-names": what}, **more)


def integer(least: int | None = None, most: int = INT64) -> Schema:
    return {"type": "integer", **({"minimum": least} if least is not None else {}), "maximum": most}


def number(**limits: float) -> Schema:
    return {"type": "number", **limits}


def one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def array(items: Schema, **more: object) -> Schema:
    return {"type": "array", "items": items, **more}


def maybe(schema: Schema) -> Schema:
    """Null is taken for absent."""
    kind = schema.get("type")
    if isinstance(kind, str) and "enum" not in schema:
        return {**schema, "type": [kind, "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def record(required: dict[str, Schema], optional: dict[str, Schema] | None = None, **more: object) -> Schema:
    """An object. Fields that are not listed are ignored in requests, and may come with answers."""
    properties = {**required, **{name: maybe(schema) for name, schema in (optional or {}).items()}}
    return {"type": "object", "properties": properties, "required": list(required), **more}


def mapping(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


METADATA = mapping(ANY)
TEXTS = mapping(STRING)
CURSOR = record({"offset": INTEGER, "limit": INTEGER, "total_count": INTEGER})
ERROR = record({"detail": STRING})


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. `body` is JSON; `protobuf` says that it may be a serialized message, too, or
    that the answer may. `statuses` are those beside 200 and the ones that every route has."""

    summary: str
    tag: str
    body: Schema | None = None
    answer: Schema = field(default_factory=dict)
    query: dict[str, Schema] = field(default_factory=dict)
    required_query: tuple[str, ...] = ()
    statuses: tuple[int, ...] = ()
    key: bool = True
    protobuf_body: str | None = None
    protobuf_answer: str | None = None
    binary_body: bool = False
    files: bool = False
    events: bool = False  # the answer may be a stream of events
    error: Schema = field(default_factory=lambda: ERROR)
