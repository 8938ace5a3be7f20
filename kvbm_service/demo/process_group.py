"""Ends an engine's processes at once, and leaves nothing of them behind."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

SHARED_MEMORY = "/dev/shm/vllm_dist_"
"""What vLLM's ranks share; nobody but they would ever remove it."""


def end_group(group: int) -> None:
    """Kill -9 the processes of a group, the calling one last if it is among them.

    Python's resource tracker is spared: once the others are gone it removes the shared memory
    and semaphores that they left, and ends.
    """
    ended = {os.getpid()}
    while fresh := set(members(group)) - ended:  # until none was started meanwhile
        for process in fresh:
            _end(process)
        ended |= fresh
    if os.getpgrp() == group:
        os.kill(os.getpid(), signal.SIGKILL)


def members(group: int) -> list[int]:
    """The processes of a group, without those that have ended and wait to be collected."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def _end(process: int) -> None:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
        maps = Path(f"/proc/{process}/maps").read_text()
    except OSError:  # it has just ended
        return
    if b"resource_tracker" in command:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    for line in maps.splitlines():
        if SHARED_MEMORY in line:
            Path(line.split(maxsplit=5)[-1]).unlink(missing_ok=True)
