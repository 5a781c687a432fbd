"""tinsmith.proto is the SDK's own protobuf, message by message and field by field."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from tinker.proto import tinker_public_pb2 as theirs

from tinsmith.wire import tinsmith_pb2 as ours


def described(module: Any) -> descriptor_pb2.FileDescriptorProto:
    """The file's description, with the package's name taken out of every reference."""
    file = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(file)
    text = file.SerializeToString().replace(
        f".{file.package}.".encode(), b".x".ljust(len(file.package) + 1, b"x") + b"."
    )
    neutral = descriptor_pb2.FileDescriptorProto.FromString(text)
    for message in neutral.message_type:
        for field in [*message.field, *(f for n in message.nested_type for f in n.field)]:
            field.type_name = field.type_name.rpartition(".")[2]
            field.ClearField("json_name")
    return neutral


THEIRS = {m.name: m for m in described(theirs).message_type}
OURS = {m.name: m for m in described(ours).message_type}


def test_the_messages_are_the_same() -> None:
    assert set(OURS) == set(THEIRS)


@pytest.mark.parametrize("name", THEIRS)
def test_a_messages_fields_are_the_same(name: str) -> None:
    def fields(message: descriptor_pb2.DescriptorProto) -> dict[str, tuple[object, ...]]:
        def oneof(f: descriptor_pb2.FieldDescriptorProto) -> str:
            return message.oneof_decl[f.oneof_index].name if f.HasField("oneof_index") else ""

        return {
            f.name: (f.number, f.label, f.type, f.type_name, f.proto3_optional, oneof(f))
            for f in message.field
        }

    def nested(message: descriptor_pb2.DescriptorProto) -> dict[str, object]:
        return {n.name: (n.options.map_entry, fields(n)) for n in message.nested_type}

    assert fields(OURS[name]) == fields(THEIRS[name])
    assert nested(OURS[name]) == nested(THEIRS[name])


def test_the_enums_are_the_same() -> None:
    def enums(module: Any) -> dict[str, dict[str, int]]:
        return {e.name: {v.name: v.number for v in e.value} for e in described(module).enum_type}

    assert enums(ours) == enums(theirs)
