"""Whatever comes over the wire is a message within its bounds, or `Malformed`; nothing else."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm_schemas.codec import AnyMessage, Decoder, Malformed, Wire, encode
from kvbm_schemas.message import MAX_BATCH_BLOCKS, MAX_MESSAGE_BYTES, Message
from tests.wire.examples import EXAMPLES, type_of

ANY: Decoder[Message] = Decoder(AnyMessage)  # type: ignore[arg-type]
KINDS = sorted({type(message) for message in EXAMPLES.values()}, key=lambda kind: kind.__name__)
DECODERS: list[Decoder[Message]] = [ANY, *(Decoder(kind) for kind in KINDS)]
PAYLOADS = [encode(message, wire) for message in EXAMPLES.values() for wire in Wire]

examples = st.sampled_from(list(EXAMPLES.values()))
payloads = st.sampled_from(PAYLOADS)
wires = st.sampled_from(list(Wire))
UNBOUNDED_SECONDS = ("loaded", "remoteread", "remotefetch", "loadresult")
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats()
    | st.text(max_size=20) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip


def decode(decoder: Decoder[Message], payload: bytes) -> Message | None:
    """The message, which must survive another round trip; None for `Malformed`."""
    try:
        message = decoder.decode(payload)
    except Malformed:
        return None
    assert isinstance(message, Message)
    again = decoder.decode(encode(message))
    assert again == message or repr(again) == repr(message)  # a NaN is not equal to itself
    return message


def fields_of(message: Message) -> dict[str, Any]:
    """The message as a dictionary, as any other program might write it."""
    fields: dict[str, Any] = msgspec.msgpack.decode(encode(message))
    return fields


# -- any bytes ---------------------------------------------------------------------------------


@given(st.binary(max_size=400))
def test_random_bytes_raise_nothing_else(payload: bytes) -> None:
    for decoder in DECODERS:
        decode(decoder, payload)


@given(st.binary(max_size=200))
def test_random_text_that_begins_like_json_raises_nothing_else(payload: bytes) -> None:
    decode(ANY, b'{"type":"' + payload)


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_a_message_that_was_cut_off_is_malformed(payload: bytes) -> None:
    for length in range(len(payload)):
        for decoder in DECODERS:
            assert decode(decoder, payload[:length]) is None


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_a_message_with_something_behind_it_is_malformed(payload: bytes) -> None:
    for decoder in DECODERS:
        assert decode(decoder, payload + b"\x00") is None


@settings(max_examples=400)
@given(payloads, st.data())
def test_a_changed_byte_raises_nothing_else(payload: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(payload) - 1))
    changed = payload[:at] + data.draw(st.binary(max_size=3)) + payload[at + 1 :]
    for decoder in DECODERS:
        decode(decoder, changed)


@given(payloads, payloads, st.data())
def test_two_messages_torn_together_raise_nothing_else(
    one: bytes, other: bytes, data: st.DataObject
) -> None:
    head = data.draw(st.integers(0, len(one)))
    tail = data.draw(st.integers(0, len(other)))
    decode(ANY, one[:head] + other[tail:])


@pytest.mark.parametrize(
    "nesting", [b"[", b'{"type":', b"\x91", b"\x81\xa4type", b"\x81\xa1x", b"\x81\x91"]
)
def test_deep_nesting_is_malformed(nesting: bytes) -> None:
    for prefix in (b"", b'{"type":"resync","x":', b"\x82\xa4type\xa6resync\xa1x"):
        assert decode(ANY, prefix + nesting * 100_000) is None


def test_what_is_too_large_is_not_even_looked_at() -> None:
    padding = b" " * MAX_MESSAGE_BYTES
    assert decode(ANY, b'{"type":"resync"}' + padding[17:]) is not None
    assert decode(ANY, b'{"type":"resync"}' + padding[16:]) is None


# -- messages that are not what they should be -------------------------------------------------


@pytest.mark.parametrize("wire", list(Wire))
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_message_of_another_type_is_malformed(name: str, wire: Wire) -> None:
    payload = encode(EXAMPLES[name], wire)
    for kind in KINDS:
        read = decode(Decoder(kind), payload)
        assert (read is not None) == (kind is type(EXAMPLES[name]))


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_field_of_another_type_is_malformed(name: str) -> None:
    message = EXAMPLES[name]
    for field in fields_of(message):
        for wrong in ({"no": "such"}, [[["no"]]], None, True, -1.5):
            if wrong is None and field in ("local", "disk") and type_of(name) == "load":
                continue  # a load need not take anything from there
            if wrong is None and field == "device" and type_of(name) == "rankrecord":
                continue  # nor need a rank lend anything
            if wrong == -1.5 and "seconds" in field and type_of(name) in UNBOUNDED_SECONDS:
                continue
            if wrong is True and field == "forget":
                continue
            for library in (msgspec.msgpack, msgspec.json):
                payload = library.encode(fields_of(message) | {field: wrong})  # type: ignore[attr-defined]
                assert decode(Decoder(type(message)), payload) is None, (field, wrong)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_message_without_a_field_that_it_needs_is_malformed(name: str) -> None:
    message = EXAMPLES[name]
    required = [f.name for f in msgspec.structs.fields(type(message)) if f.required]
    for missing in required:
        fields = fields_of(message)
        del fields[missing]
        assert decode(Decoder(type(message)), msgspec.msgpack.encode(fields)) is None, missing
    fields = fields_of(message)
    del fields["type"]
    assert decode(ANY, msgspec.msgpack.encode(fields)) is None


@settings(max_examples=300)
@given(examples, plain, wires, st.data())
def test_any_value_in_any_field_raises_nothing_else(
    message: Message, value: object, wire: Wire, data: st.DataObject
) -> None:
    fields = fields_of(message)
    field = data.draw(st.sampled_from(sorted(fields)))
    encoder = msgspec.json if wire is Wire.JSON else msgspec.msgpack
    payload = encoder.encode(fields | {field: value})  # type: ignore[attr-defined]
    for decoder in (ANY, Decoder(type(message))):
        decode(decoder, payload)


HASHES = bytes(16)
TOO_MANY = bytes(16 * (MAX_BATCH_BLOCKS + 1))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("stored", {"hashes": bytes(17)}),
        ("stored", {"hashes": TOO_MANY}),
        ("stored", {"epoch": -1}),
        ("stored", {"seq": -1}),
        ("stored", {"seq": 1 << 63}),
        ("stored", {"tier": "G9"}),
        ("removed", {"hashes": bytes(15)}),
        ("loaded", {"request": "r" * 257}),
        ("loaded", {"sources": [{"node": "a.b", "tier": "G2", "blocks": 1, "bytes": 1}]}),
        ("lookup", {"hashes": bytes(1)}),
        ("locate", {"hashes": bytes(1)}),
        ("acquire", {"hashes": bytes(1)}),
        ("located", {"segments": [{"node": "a.b", "tier": "G2", "start": 0, "count": 1}]}),
        ("located", {"segments": [{"node": "a", "tier": "G2", "start": -1, "count": 1}]}),
        ("located", {"segments": [{"node": "a", "tier": "G2", "start": 0, "count": 1 << 40}]}),
        ("placements", {"holders": [[{"node": "", "tier": "G2"}]]}),
        ("leased", {"lease": "short"}),
        ("leased", {"lease": "l" * 65}),
        ("leased", {"seconds": 0.0}),
        ("leased", {"seconds": 1e9}),
        ("leased", {"seconds": float("nan")}),
        ("leased", {"seconds": float("inf")}),
        ("leased", {"slots": bytes(5)}),
        ("leased", {"slots": bytes(4)}),
        ("leased", {"fills": bytes(8)}),
        ("leased", {"fills": bytes(17)}),
        ("refused", {"reason": "r" * 257}),
        ("release", {"lease": ""}),
        ("snapshotchunk", {"index": 3}),
        ("snapshotchunk", {"total": 0}),
        ("snapshotchunk", {"hashes": bytes(1)}),
        ("noderecord", {"node": "a b"}),
        ("noderecord", {"node": "registry.x"}),
        ("noderecord", {"world_size": 0}),
        ("noderecord", {"epoch": (1 << 64) - 1}),
        ("fetch", {"hashes": bytes(33)}),
        ("fetch", {"fills": bytes(15)}),
        ("fetch", {"disk": bytes(7)}),
        ("fetch", {"host": bytes(7)}),
        ("fetch", {"hashes": bytes(16)}),
        ("fetch", {"fills": bytes(8)}),
        ("fetch", {"disk": bytes(4)}),
        ("fetch", {"host": bytes(12)}),
        ("fetch", {"op": -1}),
        ("fetch", {"instance": "i" * 65}),
        ("moved", {"op": -1}),
        ("moved", {"failed": bytes(7)}),
        ("moved", {"reason": "r" * 257}),
        ("moved", {"seconds": float("nan")}),
        ("rankrecord", {"rank": -1}),
        ("rankrecord", {"agent": "a" * 257}),
        ("rankrecord", {"agent_metadata": bytes((1 << 18) + 1)}),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_a_field_out_of_its_bounds_is_malformed(name: str, changes: dict[str, Any]) -> None:
    fields = fields_of(EXAMPLES[name])
    assert decode(ANY, msgspec.msgpack.encode(fields)) is not None
    assert decode(ANY, msgspec.msgpack.encode(fields | changes)) is None
