"""What holds for all tests: nothing from outside the checkout, any speed will do, and no process
is left behind.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

OURS = ("KVBM_", "DYN_KVBM_", "NATS_")
GRACE_SECONDS = 5.0
PYTHONS_OWN = (b"resource_tracker", b"forkserver")
"""Helpers of multiprocessing, which end with the process that they belong to."""

for name in [name for name in os.environ if name.startswith(OURS)]:
    del os.environ[name]  # settings of the shell we run in must not decide what a test finds

settings.register_profile("any speed", deadline=None)  # 200 ms are nothing to a busy machine
settings.load_profile("any speed")


def _children() -> list[str]:
    """The command lines of this process's living children."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            children = (task / "children").read_text().split()
        except OSError:  # the thread has just ended
            continue
        for child in children:
            try:
                command = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:  # it has just ended
                continue
            if command and not any(helper in command for helper in PYTHONS_OWN):
                found.append(f"{child}: {command.replace(bytes(1), b' ').decode(errors='replace')}")
    return found


@pytest.fixture(scope="session", autouse=True)
def no_process_left_behind() -> Iterator[None]:
    """Fail at the end when a test has left a child process."""
    yield
    deadline = time.monotonic() + GRACE_SECONDS
    while (left := _children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"left running: {left}"
