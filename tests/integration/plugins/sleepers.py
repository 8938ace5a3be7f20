"""A plugin of vLLM's, loaded by each process of an engine: whoever waits sleeps.

vLLM's processes look for messages in shared memory without a pause, until none has come for a
second. Where a test has two cores for four engines, those who wait take them from those who work.
"""

from __future__ import annotations

from typing import Any

LOOK_MS = 20
"""A word that one may look is lost when it comes before whoever waits can hear it."""


def begin() -> None:
    """Have every wait for a message end with the word that there is one."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    spin = SpinCondition.wait

    def wait(self: Any, timeout_ms: int | None = None) -> None:
        self.busy_loop_s = 0.0
        spin(self, LOOK_MS if timeout_ms is None else min(timeout_ms, LOOK_MS))

    SpinCondition.wait = wait
