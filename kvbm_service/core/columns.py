"""Columns of numbers as messages carry them: little endian, fixed width."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable

assert array("I").itemsize == 4
assert array("Q").itemsize == 8


def _bytes(numbers: array[int]) -> bytes:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _numbers(code: str, column: bytes) -> array[int]:
    numbers: array[int] = array(code, column)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def pack_u32(numbers: Iterable[int]) -> bytes:
    """Slot or device block numbers, 4 bytes each."""
    return _bytes(array("I", numbers))


def pack_u64(numbers: Iterable[int]) -> bytes:
    """Fill stamps, 8 bytes each."""
    return _bytes(array("Q", numbers))


def unpack_u32(column: bytes) -> array[int]:
    """Undo `pack_u32`."""
    return _numbers("I", column)


def unpack_u64(column: bytes) -> array[int]:
    """Undo `pack_u64`."""
    return _numbers("Q", column)
