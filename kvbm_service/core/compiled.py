"""Functions compiled to machine code, for the few loops that touch every block.

They take and change numpy arrays and nothing else, hold no state, and release the GIL. The
machine code is kept on disk beside the source, or in numba's own cache directory; where
neither can be written it is compiled again in each process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

from numba import njit

P = ParamSpec("P")
R = TypeVar("R")


class Compiler:
    """Decorates functions that are to be compiled, at their first call.

    `sources` are the files of these functions and of all compiled functions that they call.
    numba takes machine code from disk as long as the function's own file is unchanged, though
    code from the other files is in it, too. So what they contain becomes part of the name
    under which machine code is kept.
    """

    def __init__(self, *sources: str) -> None:
        contents = b"".join(Path(source).read_bytes() for source in sources)
        self._version = hashlib.sha256(contents).hexdigest()[:12]

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        function.__qualname__ += f"_{self._version}"
        try:
            return cast("Callable[P, R]", njit(nogil=True, cache=True)(function))
        except RuntimeError:  # no place to keep machine code
            return cast("Callable[P, R]", njit(nogil=True)(function))
