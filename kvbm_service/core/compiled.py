"""Functions compiled to machine code, for the few loops that touch every block.

They take and change numpy arrays and nothing else, hold no state, and release the GIL. The
machine code is kept on disk beside the source, or in numba's own cache directory; where
neither can be written it is compiled again in each process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

from numba import njit

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` at its first call; mixing signed and unsigned words is up to it."""
    try:
        return cast("Callable[P, R]", njit(nogil=True, cache=True)(function))
    except RuntimeError:  # no place to keep machine code
        return cast("Callable[P, R]", njit(nogil=True)(function))
