"""Messages as people and as JSON see them."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable

import msgspec

from kvbm_schemas.block import unpack

SHORT_HASH = 8
"""Hex digits of a shortened hash."""

SHOWN_ITEMS = 3
"""Items of a column that a line shows, unless all of them are wanted."""


def _hexes(column: bytes) -> list[object]:
    return [block.hex() for block in unpack(column)]


def _integers(item: str) -> Callable[[bytes], list[object]]:
    width = struct.calcsize(item)
    return lambda column: list(struct.unpack(f"<{len(column) // width}{item}", column))


_COLUMNS: dict[str, Callable[[bytes], list[object]]] = {
    "hashes": _hexes,
    "slots": _integers("I"),
    "host": _integers("I"),
    "disk": _integers("I"),
    "failed": _integers("I"),
    "fills": _integers("Q"),
}


def as_data(value: object, field: str = "") -> object:
    """A message as plain data: hashes in hex, packed columns as lists, other bytes in base64."""
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        fields = {name: as_data(getattr(value, name), name) for name in value.__struct_fields__}
        return {"type": tag, **fields} if tag else fields
    if isinstance(value, bytes):
        column = _COLUMNS.get(field)
        return column(value) if column else base64.b64encode(value).decode()
    if isinstance(value, (list, tuple)):
        return [as_data(item) for item in value]
    return value


def as_line(message: msgspec.Struct, full: bool = False) -> str:
    """A message as one line: its type, then its fields, epoch last."""
    fields = sorted(message.__struct_fields__, key=lambda name: name == "epoch")
    shown = (f"{name} {_item(getattr(message, name), name, full)}" for name in fields)
    return "  ".join([f"{message.__struct_config__.tag:<8}", *shown]).rstrip()


def _item(value: object, field: str, full: bool) -> str:
    if isinstance(value, bytes):
        if field not in _COLUMNS:
            return f"<{len(value)} bytes>"
        return _column(_COLUMNS[field](value), field == "hashes", full)
    if isinstance(value, tuple):
        return "[" + ", ".join(_item(item, "", full) for item in value) + "]"
    if isinstance(value, msgspec.Struct):
        inner = (f"{n}={_item(getattr(value, n), n, full)}" for n in value.__struct_fields__)
        return f"({' '.join(inner)})"
    return printable(str(value)) or "-"


def _column(items: list[object], hashes: bool, full: bool) -> str:
    if full:
        return f"({len(items)}) {' '.join(map(str, items))}"
    width = SHORT_HASH if hashes else None
    shown = " ".join(str(item)[:width] for item in items[:SHOWN_ITEMS])
    return f"({len(items)}) {shown}{' …' if len(items) > SHOWN_ITEMS else ''}"


def printable(text: str) -> str:
    """`text` with what could steer a terminal escaped: it came from somebody else."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def size(amount: float) -> str:
    """A number of bytes in decimal units, as the settings count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"
