"""Bytes to messages and back. msgpack by default, JSON on request; readers take both."""

from __future__ import annotations

import enum
from typing import Any, Generic, TypeVar, Union

import msgspec

from kvbm_schemas.events import BlockEvent, Loaded
from kvbm_schemas.message import MAX_MESSAGE_BYTES, Message
from kvbm_schemas.records import DirectoryRecord
from kvbm_schemas.requests import (
    Acquire,
    LeaseAnswer,
    Locate,
    Located,
    Lookup,
    Placements,
    Release,
    Renew,
    Resync,
    SnapshotChunk,
)
from kvbm_schemas.step import Expect, Fetch, Lend, Moved

M = TypeVar("M")

AnyMessage = (
    BlockEvent
    | Loaded
    | Lookup
    | Located
    | Locate
    | Placements
    | Acquire
    | LeaseAnswer
    | Release
    | Renew
    | Resync
    | SnapshotChunk
    | Fetch
    | Lend
    | Expect
    | Moved
    | DirectoryRecord
)
"""Everything that can be seen on the bus or in the directory."""


class Wire(enum.StrEnum):
    """How messages are written."""

    MSGPACK = "msgpack"
    JSON = "json"


class Malformed(ValueError):
    """Bytes that are not the message expected. The sender is at fault; nothing was changed."""


_msgpack = msgspec.msgpack.Encoder()
_json = msgspec.json.Encoder()


def encode(message: Message, wire: Wire = Wire.MSGPACK) -> bytes:
    """Write a message."""
    return _json.encode(message) if wire is Wire.JSON else _msgpack.encode(message)


class _Nobody(msgspec.Struct, frozen=True, tag_field="type", tag="nobody"):
    """Never sent. Where only one type is expected, msgspec asks for no tag; among two, it does."""


class Decoder(Generic[M]):
    """Reads one type (or union) of message, from either wire format."""

    def __init__(self, kind: type[M]) -> None:
        tagged: Any = Union[kind, _Nobody]  # noqa: UP007
        self._msgpack: msgspec.msgpack.Decoder[M | _Nobody] = msgspec.msgpack.Decoder(tagged)
        self._json: msgspec.json.Decoder[M | _Nobody] = msgspec.json.Decoder(tagged)

    def decode(self, payload: bytes) -> M:
        """Read a message.

        Raises:
            Malformed: too large, cut off, of another type, or with a field out of bounds.
        """
        if len(payload) > MAX_MESSAGE_BYTES:
            raise Malformed(f"{len(payload)} bytes, more than {MAX_MESSAGE_BYTES}")
        try:
            decoder = self._json if payload[:1] == b"{" else self._msgpack
            message = decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Malformed(str(error)) from error
        if isinstance(message, _Nobody):
            raise Malformed("nobody sends this")
        return message
