"""A launch script that runs, as somebody at a terminal would see it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvbm_service.demo.process_group import end_group, members
from tests.patience import until

SCRIPTS = Path(__file__).parents[2] / "deploy" / "launch"
HTTP_SECONDS = 120.0


class Script:
    """One run of a script, and every process group that has belonged to it."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process = process
        self._output = output
        self._groups: set[int] = set()

    def __str__(self) -> str:
        return self.said

    @property
    def said(self) -> str:
        return self._output.read_text(errors="replace")

    @property
    def port(self) -> str:
        return re.findall(r"ready after .* on http://localhost:(\d+)", self.said)[0]

    @property
    def engines(self) -> dict[str, str]:
        """Name and URL of each."""
        return dict(re.findall(r"^  (\S+-\d+) +(http://\S+)$", self.said, re.MULTILINE))

    def wait_until_ready(self, seconds: float) -> None:
        def is_ready() -> bool:
            self._note_children()
            assert self.process.poll() is None, self.said
            return "Ctrl-C stops everything" in self.said

        until(is_ready, self, seconds)

    def wait_until_ended(self, seconds: float = 90.0) -> int:
        def has_ended() -> bool:
            self._note_children()
            return self.process.poll() is not None

        until(has_ended, "the script does not end", seconds)
        return self.process.wait()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it with a signal; returns its exit status."""
        self._note_children()
        self.process.send_signal(number)
        return self.wait_until_ended()

    def processes(self) -> list[int]:
        """Those of all groups that it has had."""
        return [process for group in self._groups for process in members(group)]

    def end(self) -> None:
        """Kill whatever there is."""
        self._note_children()
        for group in {self.process.pid, *self._groups}:
            end_group(group)
        self.process.wait()

    def _note_children(self) -> None:
        for task in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            try:
                self._groups |= {int(child) for child in task.read_text().split()}
            except OSError:  # the thread has just ended
                continue


@contextmanager
def running(
    name: str, *arguments: str, folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Script]:
    """Run a script; in the end nothing of it is left. Its output goes into `folder`."""
    output = folder / "said.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [str(SCRIPTS / name), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHON": sys.executable, **(environment or {})},
            start_new_session=True,
        )
    script = Script(process, output)
    try:
        yield script
    finally:
        script.end()


def ask(url: str, path: str, body: dict[str, Any]) -> bytes:
    """What is answered to a POST."""
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=HTTP_SECONDS) as answer:
        found: bytes = answer.read()
    return found


def nobody_listens(port: int) -> bool:
    """Whether the port is free again."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
