"""A process that obeys: one line of JSON in, one out. It ends with the test, and can be stopped.

child = Child("tests.contracts.lone_leader", options, log=tmp_path / "a.log")
assert child.ask(do="status")["epoch"] > 0
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvbm_service.adapters.embedded_server import die_with

ANSWER_SECONDS = 90.0
"""A process that imports torch on a busy machine takes its time for the first answer."""


class Child:
    """One such process, which `serve`s."""

    def __init__(
        self,
        module: str,
        options: Mapping[str, Any],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})},
            )  # no code of ours between fork and exec: gRPC in this process does not bear it
        self._unread = b""

    def ask(self, **order: Any) -> Any:
        """Give an order, and wait for what it says."""
        self.tell(**order)
        return self.hear()

    def tell(self, **order: Any) -> None:
        """Give an order; a process that has ended does not hear it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        """The next thing that it says."""
        assert self._process.stdout is not None
        while b"\n" not in self._unread:
            speech, _, _ = select.select([self._process.stdout], [], [], ANSWER_SECONDS)
            assert speech, f"nothing was said; see {self.log.read_text()[-2000:]}"
            heard = os.read(self._process.stdout.fileno(), 1 << 16)
            assert heard, f"it has ended; see {self.log.read_text()[-2000:]}"
            self._unread += heard
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    @property
    def said(self) -> str:
        """What it has logged so far."""
        return self.log.read_text()

    def stop(self) -> None:
        """SIGSTOP."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9, stopped or not, and wait for the end."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Kill it if it still lives, and let go of its pipes."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def serve(make: Callable[..., Any]) -> None:
    """In such a process: obey until nobody is there to say anything.

    An order `do` is a method of what `make` makes of the options, the rest its arguments.
    """
    die_with(os.getppid())
    answers = os.dup(1)
    os.dup2(2, 1)  # libraries log there
    servant = make(**json.loads(sys.argv[1]))
    for line in sys.stdin.buffer:
        order = json.loads(line)
        answer = json.dumps(getattr(servant, order.pop("do"))(**order))
        os.write(answers, answer.encode() + b"\n")
