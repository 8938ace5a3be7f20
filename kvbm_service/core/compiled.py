"""Functions compiled to machine code, for the few loops that touch every block.

They take and change numpy arrays and nothing else, hold no state, and release the GIL. The
machine code is kept on disk beside the source, or in numba's own cache directory; where
neither can be written it is compiled again in each process.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import ParamSpec, TypeVar, cast

from numba import njit

P = ParamSpec("P")
R = TypeVar("R")


class Compiler:
    """Decorates functions of one file that are to be compiled, at their first call.

    `uses` are the other modules whose compiled functions they call. numba takes machine code
    from disk as long as the function's own file is unchanged, though code from the others is
    in it, too. So what those contain becomes part of the name under which it is kept.
    """

    def __init__(self, *uses: ModuleType) -> None:
        sources = "".join(map(inspect.getsource, uses))
        self._version = hashlib.sha256(sources.encode()).hexdigest()[:12]

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        function.__qualname__ += f"_{self._version}"
        try:
            return cast("Callable[P, R]", njit(nogil=True, cache=True)(function))
        except RuntimeError:  # no place to keep machine code
            return cast("Callable[P, R]", njit(nogil=True)(function))
