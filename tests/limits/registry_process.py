"""A registry in a process of its own, as a test sees it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("registry_child.py")
PATIENCE_SECONDS = 60.0


class RegistryProcess:
    """`start` it, ask its `status`, `close` it."""

    def __init__(self, url: str, log: Path, lease_seconds: float = 10.0) -> None:
        self._url = url
        self._log = log
        self._lease_seconds = lease_seconds
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start, and wait until it answers questions."""
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, CHILD, self._url, str(self._lease_seconds),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )  # fmt: skip
        await self.status()

    async def close(self) -> None:
        """End it."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            await process.wait()
            assert process.stdin is not None
            process.stdin.close()

    def send(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    async def status(self) -> dict[str, Any]:
        """How it is doing."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        async with asyncio.timeout(PATIENCE_SECONDS):
            return dict(json.loads(await self._process.stdout.readline()))

    async def until(
        self, holds: Callable[[dict[str, Any]], object], seconds: float
    ) -> dict[str, Any]:
        """Wait for a status for which this holds; fail if none comes in time."""
        deadline = time.monotonic() + seconds
        while True:
            status = await self.status()
            if holds(status):
                return status
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {status}"
            await asyncio.sleep(0.02)

    @property
    def log(self) -> str:
        """What it has logged."""
        return self._log.read_text()
