"""The bytes of every message, as they were when it was first released."""

from __future__ import annotations

import json
from collections.abc import Iterator

import msgspec
import pytest

import kvbm_schemas.codec
import kvbm_schemas.step
from kvbm_schemas.codec import AnyMessage, Decoder, Wire, encode
from kvbm_schemas.message import Message
from tests.wire.examples import EXAMPLES, GOLDEN, type_of

BYTES: dict[str, dict[str, str]] = json.loads(GOLDEN.read_text())


def message_types(base: type[Message] = Message) -> Iterator[type[Message]]:
    for kind in base.__subclasses__():
        if kind.__module__.startswith("kvbm_schemas."):
            yield kind
        yield from message_types(kind)


def golden(name: str, wire: Wire) -> bytes:
    written = BYTES[name][wire.value]
    return written.encode() if wire is Wire.JSON else bytes.fromhex(written)


def read(name: str, payload: bytes) -> Message:
    kind: type[Message] = type(EXAMPLES[name])
    return Decoder(kind).decode(payload)


@pytest.mark.parametrize("wire", list(Wire))
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_message_is_written_as_ever(name: str, wire: Wire) -> None:
    assert name in BYTES, f"no golden bytes of {name}: see tests/wire/examples.py"
    assert encode(EXAMPLES[name], wire) == golden(name, wire)


@pytest.mark.parametrize("wire", list(Wire))
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_message_of_old_is_still_read(name: str, wire: Wire) -> None:
    assert read(name, golden(name, wire)) == EXAMPLES[name]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_message_with_fields_of_the_future_is_read(name: str) -> None:
    fields = msgspec.json.decode(golden(name, Wire.JSON))
    fields["of the future"] = {"deep": [1, 2.5, None, "text"]}
    assert read(name, msgspec.json.encode(fields)) == EXAMPLES[name]
    fields = msgspec.msgpack.decode(golden(name, Wire.MSGPACK))
    fields["of the future"] = {"deep": [1, 2.5, None, b"bytes"]}
    assert read(name, msgspec.msgpack.encode(fields)) == EXAMPLES[name]


def test_every_message_type_has_golden_bytes() -> None:
    types = {str(kind.__struct_config__.tag) for kind in message_types()}
    assert types == {type_of(name) for name in BYTES}, "see tests/wire/examples.py"


def test_golden_bytes_have_an_example_each() -> None:
    assert set(BYTES) == set(EXAMPLES)
    for name, message in EXAMPLES.items():
        assert message.__struct_config__.tag == type_of(name)


def test_every_field_of_every_message_is_seen_with_a_value_of_its_own() -> None:
    shown: dict[type[Message], set[str]] = {}
    for message in EXAMPLES.values():
        fields = msgspec.structs.fields(type(message))
        shown.setdefault(type(message), set()).update(
            field.name for field in fields if getattr(message, field.name) != field.default
        )
    for kind in message_types():
        missing = {field.name for field in msgspec.structs.fields(kind)} - shown[kind]
        assert not missing, f"{kind.__name__}: no example shows {missing}"


@pytest.mark.parametrize("wire", list(Wire))
def test_every_message_seen_on_the_bus_is_told_apart_by_its_type(wire: Wire) -> None:
    decoder: Decoder[Message] = Decoder(AnyMessage)  # type: ignore[arg-type]
    kinds = set(kvbm_schemas.codec.AnyMessage.__args__)
    seen = {name for name, message in EXAMPLES.items() if type(message) in kinds}
    assert {type(EXAMPLES[name]) for name in seen} == kinds
    for name in seen:
        assert decoder.decode(golden(name, wire)) == EXAMPLES[name]


def test_no_golden_bytes_are_a_duplicate() -> None:
    for wire in Wire:
        payloads = [golden(name, wire) for name in BYTES]
        assert len(set(payloads)) == len(payloads)
