"""From a traced loss as plain data (SDK types CustomLossGraph, CustomLossInput) to a program.

Everything is checked here that can be without a datum: names, order, references to what is there already,
the operations, sizes. Errors name the node.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from tinsmith.engine.losses.custom.operations import (
    FORBIDDEN_ARGUMENTS,
    FUNCTIONS,
    METHODS_OF_TENSORS,
    Operation,
)
from tinsmith.wire.errors import WireError
from tinsmith.wire.fields import Fields
from tinsmith.wire.training import ContentError

MOST_BYTES = 1 << 20
MOST_NODES = 2048
MOST_INPUTS = 16
MOST_ARGUMENTS = 1024  # of a node, also within lists
DEEPEST = 8
LONGEST_TEXT = 256
LARGEST_INTEGER = 2**63 - 1

_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
_INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float16", "bfloat16", "float32", "float64", "half", "float", "double", "int8", "int16", "int32",
        "int64", "short", "int", "long", "uint8", "bool",
    )
}  # fmt: skip
_FLOATS = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}
_MEMORY_FORMATS = {n: getattr(torch, n) for n in ("contiguous_format", "preserve_format")}


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of an earlier node."""

    name: str


@dataclass(frozen=True, slots=True)
class Node:
    """One step; `args` and `kwargs` may hold Refs, in tuples, lists and slices too."""

    name: str
    target: str
    operation: Operation
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Program:
    """`inputs` are (name, rank), logprobs first; `places` the nodes that take them. `loss` and `metrics`
    name nodes."""

    name: str
    inputs: tuple[tuple[str, int], ...]
    places: tuple[str, ...]
    nodes: tuple[Node, ...]
    loss: str
    metrics: dict[str, str]


@lru_cache(maxsize=64)
def read_program(body: bytes) -> Program:
    """Of the JSON {"name", "inputs", "graph"} as a create_custom_loss request has it. Raises ContentError."""
    if len(body) > MOST_BYTES:
        raise ContentError(f"graph has {len(body)} bytes; at most {MOST_BYTES} are allowed")
    try:
        fields = Fields(json.loads(body))
        inputs = _read_inputs(fields)
        return _read_graph(fields.text("name", longest=1024), inputs, fields.child("graph"))
    except (WireError, RecursionError, ValueError) as error:
        if isinstance(error, ContentError):
            raise
        raise ContentError(str(error) or "graph is nested too deeply") from None


def _read_inputs(fields: Fields) -> tuple[tuple[str, int], ...]:
    inputs: list[tuple[str, int]] = []
    for index, item in enumerate(fields.array("inputs")):
        each = Fields(item, f"inputs[{index}]")
        name = each.text("name")
        if not _INPUT_NAME.fullmatch(name) or name in [n for n, _ in inputs]:
            raise each.error("name", f"{name[:64]!r} must be a lowercase name, and only once")
        inputs.append((name, each.integer("rank", least=0, most=2)))
    if not 1 <= len(inputs) <= MOST_INPUTS or inputs[0][0] != "logprobs" or inputs[0][1] == 0:
        raise fields.error("inputs", f"must be 1 to {MOST_INPUTS}, the first one 'logprobs' with rank 1 or 2")
    return tuple(inputs)


def _read_graph(name: str, inputs: tuple[tuple[str, int], ...], graph: Fields) -> Program:
    if graph.raw("format") not in (None, 1):
        raise graph.error("format", f"must be 1, not {graph.raw('format')!r}"[:120])
    items = graph.array("nodes")
    if len(items) > MOST_NODES:
        raise graph.error("nodes", f"are {len(items)}; at most {MOST_NODES} are allowed")
    known: set[str] = set()
    places: list[str] = []
    nodes: list[Node] = []
    for index, item in enumerate(items):
        fields = Fields(item, f"graph.nodes[{index}]")
        kind, node_name = fields.text("op"), fields.text("name")
        if not _NODE_NAME.fullmatch(node_name) or node_name in known:
            raise fields.error("name", f"{node_name[:64]!r} must be a plain name that no earlier node has")
        if kind == "placeholder":
            _check_placeholder(fields, inputs, len(places), bool(nodes))
            places.append(node_name)
        elif kind == "output":
            if index != len(items) - 1:
                raise fields.error("op", "output must be the last node")
            if len(places) != len(inputs):
                raise graph.error("nodes", f"take {len(places)} inputs, but {len(inputs)} are declared")
            loss, metrics = _read_output(fields, known)
            return Program(name, inputs, tuple(places), tuple(nodes), loss, metrics)
        else:
            nodes.append(_read_node(fields, kind, node_name, known))
        known.add(node_name)
    raise graph.error("nodes", "have no output at their end")


def _check_placeholder(fields: Fields, inputs: tuple[tuple[str, int], ...], place: int, late: bool) -> None:
    if late or place >= len(inputs) or fields.text("target") != inputs[place][0]:
        raise fields.error(
            "target", "placeholders come first, one for each input, in the order of the inputs"
        )
    if fields.raw("args") or fields.raw("kwargs"):
        raise fields.error("args", "an input has no default here")


def _read_node(fields: Fields, kind: str, name: str, known: set[str]) -> Node:
    target = fields.text("target")
    table = {"call_function": FUNCTIONS, "call_method": METHODS_OF_TENSORS}.get(kind)
    if table is None:
        raise fields.error(
            "op", f"{kind[:60]!r} is not allowed in a custom loss; it may call functions and methods alone"
        )
    operation = table.get(target)
    if operation is None:
        what = "function" if kind == "call_function" else "method"
        raise fields.error("target", f"the {what} {target[:120]!r} is not allowed in a custom loss")
    reader = _Arguments(fields, known)
    args = tuple(reader.read(each, 0) for each in fields.array("args")) if fields.has("args") else ()
    kwargs: dict[str, Any] = {}
    given = fields.optional_child("kwargs")
    for key, value in given.values().items() if given is not None else ():
        if key in FORBIDDEN_ARGUMENTS and value is not None:
            raise fields.error("kwargs", f"{key!r} is not allowed in a custom loss")
        if key not in FORBIDDEN_ARGUMENTS:
            kwargs[key] = reader.read(value, 0)
    return Node(name, target, operation, args, kwargs)


class _Arguments:
    """Reads the arguments of one node, within bounds on their number and depth."""

    def __init__(self, fields: Fields, known: set[str]) -> None:
        self._fields, self._known = fields, known
        self._left = MOST_ARGUMENTS

    def read(self, value: object, depth: int) -> Any:
        self._left -= 1
        if depth > DEEPEST or self._left < 0:
            raise self._wrong(f"are more than {MOST_ARGUMENTS}, or nested deeper than {DEEPEST}")
        if value is None or isinstance(value, bool | float):
            return value
        if isinstance(value, int):
            if abs(value) > LARGEST_INTEGER:
                raise self._wrong("hold an integer of more than 64 bits")
            return value
        if isinstance(value, str):
            if len(value) > LONGEST_TEXT:
                raise self._wrong(f"hold a text of more than {LONGEST_TEXT} characters")
            return value
        if isinstance(value, list):
            return [self.read(each, depth + 1) for each in value]
        if isinstance(value, dict) and len(value) == 1:
            ((kind, content),) = value.items()
            return self._tagged(kind, content, depth)
        raise self._wrong("must be plain values, lists, or objects of one key such as {'ref': NODE}")

    def _tagged(self, kind: str, content: object, depth: int) -> Any:
        if kind == "ref" and isinstance(content, str):
            if content not in self._known:
                raise self._wrong(f"refer to {content[:64]!r}, which is no earlier node")
            return Ref(content)
        if kind == "tuple" and isinstance(content, list):
            return tuple(self.read(each, depth + 1) for each in content)
        if kind == "slice" and isinstance(content, list) and len(content) == 3:
            return slice(*(self.read(each, depth + 1) for each in content))
        if kind == "ellipsis" and content is True:
            return ...
        if kind == "float" and content in _FLOATS:
            return _FLOATS[str(content)]
        if kind == "dtype" and content in _DTYPES:
            return _DTYPES[str(content)]
        if kind == "device" and content == "cpu":
            return torch.device("cpu")
        if kind == "memory_format" and content in _MEMORY_FORMATS:
            return _MEMORY_FORMATS[str(content)]
        raise self._wrong(
            f"hold {kind[:60]!r} of {str(content)[:60]!r}, which is not allowed in a custom loss"
        )

    def _wrong(self, problem: str) -> WireError:
        return self._fields.error("args", problem)


def _read_output(fields: Fields, known: set[str]) -> tuple[str, dict[str, str]]:
    """The nodes of the loss and of each metric, of what the traced function returns: (loss, metrics)."""
    args = fields.array("args")
    pair = args[0] if len(args) == 1 else None
    if isinstance(pair, dict) and list(pair) == ["tuple"]:
        pair = pair["tuple"]
    if not isinstance(pair, list) or len(pair) != 2:
        raise fields.error("args", "must be (loss, metrics), a tensor and a dict")
    reader = _Arguments(fields, known)
    loss = reader.read(pair[0], 0)
    metrics = pair[1].get("dict") if isinstance(pair[1], dict) and list(pair[1]) == ["dict"] else None
    if not isinstance(loss, Ref) or not isinstance(metrics, dict):
        raise fields.error("args", "must be (loss, metrics), a tensor and a dict")
    named: dict[str, str] = {}
    for key, value in metrics.items():
        ref = reader.read(value, 1)
        if not _METRIC.fullmatch(key) or not isinstance(ref, Ref):
            raise fields.error(
                "args", f"metric {key[:80]!r} must be custom/NAME:sum or custom/NAME:mean, and a tensor"
            )
        named[key] = ref.name
    return loss.name, named
