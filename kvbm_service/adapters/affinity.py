"""Which CPUs a thread of ours may run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def use_every_cpu() -> None:
    """Let the calling thread, and threads it starts later, run on every CPU we are allowed.

    Engines pin their threads, and whatever they start inherits the mask: our threads would
    then fight the engine's compute threads for its cores. The kernel cuts the mask down to
    the container's CPU set by itself.
    """
    os.sched_setaffinity(0, range(os.sysconf("SC_NPROCESSORS_CONF")))


@contextmanager
def every_cpu() -> Iterator[None]:
    """For threads started inside: let them run on every CPU, and leave the caller where it was."""
    before = os.sched_getaffinity(0)
    use_every_cpu()
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
