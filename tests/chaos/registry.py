"""A registry in a process of its own, to be killed, stopped, and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from kvbm_service.adapters.embedded_server import mortal
from kvbm_service.demo.process_group import end_group
from tests.chaos.wall_clock import WallClock


class RegistryProcess:
    """One of the arena's registries. Starting it does not wait until it answers."""

    def __init__(
        self, name: str, url: str, log: Path, environment: Mapping[str, str], clock: WallClock
    ) -> None:
        self.name = name
        self.clock = clock
        self._command = [sys.executable, "-m", "kvbm_service.cli", "registry", "--nats-url", url]
        self._log = log
        self._environment = os.environ | dict(environment) | dict(clock.environment)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, unless it runs."""
        if self._process is not None:
            return
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                mortal(self._command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self._environment,
            )

    def kill(self) -> None:
        """Kill -9 it."""
        if self._process is not None:
            end_group(self._process.pid)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """SIGSTOP."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
