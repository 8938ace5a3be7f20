"""Nodes and a registry in processes of their own, with the directory apart from the bus."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.faults.light_node import LightNode, chain
from tests.patience import until

ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(sys.path)}
START_SECONDS = 90.0
PAUSES_SECONDS = (0.0, 0.0, 0.05, 0.25, 1.0)


class ThisMachine:
    """Where the processes of a test run; they end with it."""

    def __init__(self, ending: ExitStack, variables: Mapping[str, str]) -> None:
        self._ending = ending
        self._variables = variables

    def start(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], **pipes: Any
    ) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                env={**os.environ, **environment, **self._variables},
                stderr=file,
                **({"stdout": file} | pipes),
            )
        self._ending.callback(_end, process)
        return process


class Cluster:
    """A registry, and nodes as they are wanted. `settings` are the fields of `Settings`.

    All of them are started with these environment variables.
    """

    def __init__(
        self,
        ending: ExitStack,
        folder: Path,
        variables: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self._machine = ThisMachine(ending, variables or {})
        self._folder = folder
        self._settings = settings
        self._seeds = itertools.count(1)

    def start_registry(self, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start one, with these variables."""
        command = [sys.executable, "-m", "kvbm_service.cli", "registry"]
        log = self._folder / "registry.log"
        return self._machine.start(command, log, ENVIRONMENT | dict(variables))

    def start_node(self, name: str) -> LightNode:
        """Start one, and wait until it obeys; who else it sees by then is left open."""
        host: Any = self._machine
        return LightNode(host, name, self._folder / f"{name}.log", **self._settings)

    def new_chain(self, blocks: int = 4) -> list[Any]:
        """A prompt that nobody was asked before."""
        return chain(next(self._seeds), blocks)

    def reads(self, reader: LightNode, owner: LightNode) -> bool:
        """Whether a prompt that `owner` has computed is read from there.

        The registry may hear of it later than `reader` asks; so that is asked later and later.
        """
        for pause in PAUSES_SECONDS:
            question = self.new_chain()
            assert owner.ask(question).right
            time.sleep(pause)
            answer = reader.ask(question)
            assert answer.right
            if answer.remote == len(question) and not answer.failed:
                return True
        return False

    def wait_until_shared(self, reader: LightNode, owner: LightNode, seconds: float) -> None:
        """Wait until `reader` reads from `owner`."""
        until(lambda: self.reads(reader, owner), f"{reader.name} reads {owner.name}", seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
