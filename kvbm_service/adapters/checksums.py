"""xxh3-64 of many blocks of memory, with the GIL released once.

The xxhash package hashes one buffer per call and gives the GIL up for each large one: beside
a busy engine every block would wait up to the interpreter's switch interval (5 ms) to go on.
So a compiled loop calls the package's C function itself.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable

import numba
import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.uint64]

_ODD = np.uint64(0x9E37_79B9_7F4A_7C15)


def seeds(hashes: npt.NDArray[np.uint64]) -> Column:
    """One seed per block name (shape (n, 2)): the same bytes under another name sum differently."""
    return hashes[:, 0] ^ (hashes[:, 1] * _ODD)


def compile_loops() -> None:
    """Compile what the functions below need: takes a moment, which no first request should."""
    _sum_loop()
    _copy_sum_loop()
    _copy_proven_loop()


def checksums(addresses: Column, nbytes: int, seeds: Column) -> Column:
    """xxh3-64 of the `nbytes` at each address, with a seed each."""
    sums = np.zeros(len(addresses), np.uint64)
    _sum_loop()(addresses, nbytes, np.ascontiguousarray(seeds), sums)
    return sums


def copy_checksums(to: Column, source: Column, nbytes: int, padded: int, seeds: Column) -> Column:
    """Copy `nbytes` from each source, then sum the `padded` bytes at each target."""
    sums = np.zeros(len(to), np.uint64)
    _copy_sum_loop()(to, source, nbytes, padded, np.ascontiguousarray(seeds), sums)
    return sums


def copy_proven(
    to: Column, source: Column, nbytes: int, padded: int, seeds: Column, expected: Column
) -> npt.NDArray[np.bool_]:
    """Copy `nbytes` from each source whose `padded` bytes sum to what is expected; say which."""
    right = np.zeros(len(to), np.bool_)
    loop = _copy_proven_loop()
    loop(to, source, nbytes, padded, np.ascontiguousarray(seeds), expected, right)
    return right


@functools.cache
def _xxh3() -> Callable[[int, int, int], int]:
    extension = importlib.import_module("xxhash._xxhash")
    function = ctypes.CDLL(extension.__file__).XXH3_64bits_withSeed
    function.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_uint64]
    function.restype = ctypes.c_uint64
    return function


@functools.cache
def _memcpy() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).memcpy
    function.argtypes = [ctypes.c_size_t] * 3
    function.restype = ctypes.c_size_t
    return function


@functools.cache
def _sum_loop() -> Callable[..., None]:
    xxh3 = _xxh3()

    @numba.njit("void(uint64[::1], uint64, uint64[::1], uint64[::1])", nogil=True)  # type: ignore[untyped-decorator]
    def loop(addresses: Column, nbytes: int, seeds: Column, sums: Column) -> None:
        for i in range(addresses.size):
            sums[i] = xxh3(addresses[i], nbytes, seeds[i])

    compiled: Callable[..., None] = loop
    return compiled


@functools.cache
def _copy_sum_loop() -> Callable[..., None]:
    memcpy, xxh3 = _memcpy(), _xxh3()

    @numba.njit(  # type: ignore[untyped-decorator]
        "void(uint64[::1], uint64[::1], uint64, uint64, uint64[::1], uint64[::1])", nogil=True
    )
    def loop(
        to: Column, source: Column, nbytes: int, padded: int, seeds: Column, sums: Column
    ) -> None:
        for i in range(to.size):
            memcpy(to[i], source[i], nbytes)
            sums[i] = xxh3(to[i], padded, seeds[i])

    compiled: Callable[..., None] = loop
    return compiled


@functools.cache
def _copy_proven_loop() -> Callable[..., None]:
    memcpy, xxh3 = _memcpy(), _xxh3()

    @numba.njit(  # type: ignore[untyped-decorator]
        "void(uint64[::1], uint64[::1], uint64, uint64, uint64[::1], uint64[::1], boolean[::1])",
        nogil=True,
    )
    def loop(
        to: Column,
        source: Column,
        nbytes: int,
        padded: int,
        seeds: Column,
        expected: Column,
        right: npt.NDArray[np.bool_],
    ) -> None:
        for i in range(to.size):
            if xxh3(source[i], padded, seeds[i]) == expected[i]:
                memcpy(to[i], source[i], nbytes)
                right[i] = True

    compiled: Callable[..., None] = loop
    return compiled
