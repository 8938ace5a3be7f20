"""Wall clocks that jump under a process, while it runs; see wall_clock.c."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("wall_clock.c")
BUILD = Path(__file__).parents[2] / "build" / "chaos"
COMPILE_SECONDS = 60.0


class WallClock:
    """The clock of the processes that are started with `environment`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.shift(0)

    @property
    def environment(self) -> Mapping[str, str]:
        """What makes a process live by this clock; nothing where that cannot be had."""
        library = _library()
        if library is None:
            return {}
        return {"LD_PRELOAD": str(library), "WALL_CLOCK_SHIFT": str(self._file)}

    @property
    def works(self) -> bool:
        """Whether it can be shifted here."""
        return _library() is not None

    def shift(self, seconds: int) -> None:
        """Let it be so far ahead of the machine's (or, below 0, behind)."""
        with self._file.open("r+b" if self._file.exists() else "w+b") as file:
            file.write(struct.pack("@q", seconds))


@cache
def _library() -> Path | None:
    """The compiled library; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    BUILD.mkdir(parents=True, exist_ok=True)
    library = BUILD / "wall_clock.so"
    draft = BUILD / f"wall_clock-{os.getpid()}.draft"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(draft), str(SOURCE), "-ldl"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    draft.rename(library)
    return library
