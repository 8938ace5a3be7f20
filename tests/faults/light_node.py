"""A light engine on a host, as a test sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import msgspec

from kvbm_schemas.block import BlockHash
from tests.faults.light_engine import Answer, Ask, Chain, Forget, Look, State
from tests.world import Host

ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(sys.path),
    # Between real hosts there is no shared memory either; here UCX would find a way.
    "UCX_TLS": "tcp,self",
}


class LightNode:
    """`ask` it. It ends with its host."""

    def __init__(self, host: Host, name: str, log: Path, **settings: object) -> None:
        """`settings` are the fields of `Settings`. Starts it, and waits until it obeys."""
        self.name = name
        self.host = host
        self.log = log
        # One thread speaks with it, so that a test can do something while it works.
        self._thread = ThreadPoolExecutor(max_workers=1)
        said = msgspec.json.encode(settings).decode()
        self.process = host.start(
            [sys.executable, "-m", "tests.faults.light_engine", name, said],
            log,
            ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._hear(None)

    def ask_soon(self, *chains: Chain) -> Future[list[Answer]]:
        """Have these prompts answered at the same time; go on meanwhile."""
        return self._thread.submit(self._obey, Ask(list(chains)), list[Answer])

    def ask(self, chain: Chain) -> Answer:
        """Have a prompt answered."""
        (answer,) = self.ask_soon(chain).result()
        return answer

    def forget(self) -> None:
        """Have it forget every block."""
        self._thread.submit(self._obey, Forget(), None).result()

    def look(self) -> State:
        """How things are there."""
        return cast(State, self._thread.submit(self._obey, Look(), State).result())

    def _obey(self, order: Ask | Forget | Look, answer: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(order) + b"\n")
        self.process.stdin.flush()
        return self._hear(answer)

    def _hear(self, answer: Any) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"{self.name} has died:\n{self.log.read_text()[-3000:]}"
        return msgspec.json.decode(line, type=answer)


def chain(seed: int, blocks: int) -> Chain:
    """The names of a prompt's blocks, which no other seed has."""
    return [BlockHash(((seed << 32) + at + 1).to_bytes(16, "big")) for at in range(blocks)]
