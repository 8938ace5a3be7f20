"""Hosts, what runs on them, and the lines between them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import msgspec

from kvbm_service.adapters.embedded_server import mortal
from kvbm_service.demo.process_group import end_group
from tests.world.line import Line, Traffic
from tests.world.namespace import NotPermitted, enter_new

__all__ = ["Host", "NotPermitted", "World", "unsent_requests"]

P = ParamSpec("P")
R = TypeVar("R")

NETWORK = "10.77.0"
"""The same in every world: they do not see each other."""
STOP_SECONDS = 5.0
LISTENS = "0A"
"""How /proc/net/tcp says that a socket takes connections."""


class Host:
    """A network namespace with an address. All that is run here sees no other network."""

    def __init__(self, name: str, address: str) -> None:
        """
        Raises:
            NotPermitted: see namespace.py.
        """
        self.name = name
        self.address = address
        self._started: list[subprocess.Popen[Any]] = []
        # One thread that lives as long as the host: a child asks to die with it.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"host-{name}")
        try:
            self.device = self.run(enter_new, address)
        except BaseException:
            self._thread.shutdown()
            raise

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `function` on this host: sockets, threads and processes that it makes are here.

        One call at a time: what takes long belongs on a thread that it starts.
        """
        return self._thread.submit(function, *args, **kwargs).result()

    def start(
        self,
        command: Sequence[str | Path],
        log: Path,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Start a process here, in a group of its own; it is killed when the world ends.

        What it says goes to `log`, unless `options` for `Popen` say otherwise.
        """
        with log.open("ab") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            start = partial(
                subprocess.Popen[Any],
                mortal(command),
                **streams | options,
                env=os.environ | dict(environment or {}),
                start_new_session=True,
            )
            process = self.run(start)
        self._started.append(process)
        return process

    def close(self) -> None:
        """Kill -9 what was started here."""
        for process in self._started:
            if process.returncode is None:  # its number is still its own
                end_group(process.pid)
                process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        self._thread.shutdown()


def unsent_requests(source: Host, target: Host) -> int:
    """Bytes that the kernel of `source` has still to bring to `target`, by TCP.

    Of the connections that `source` has made: on those that it has accepted it only answers, and
    says now and again that it is there.
    """
    reversed_address = socket.inet_aton(target.address)[::-1].hex().upper()
    table = source.run(Path("/proc/thread-self/net/tcp").read_text)
    rows = [line.split()[1:5] for line in table.splitlines()[1:]]
    accepting = {local.split(":")[1] for local, _, state, _ in rows if state == LISTENS}
    return sum(
        int(queues.split(":")[0], 16)
        for local, remote, _, queues in rows
        if remote.startswith(reversed_address) and local.split(":")[1] not in accepting
    )


class World:
    """Some hosts and the network between them; see the package's words. A context manager.

    Lines may be changed at any time, and have changed when the call returns. Of one world, they
    are to be changed by one thread at a time.
    """

    def __init__(self, *names: str, seed: int = 0) -> None:
        self._names = names
        self._seed = seed
        self._hosts: dict[str, Host] = {}
        self._switch: subprocess.Popen[bytes] | None = None
        self._ending = ExitStack()

    def __enter__(self) -> Self:
        """
        Raises:
            NotPermitted: this machine does not let us make hosts.
        """
        with ExitStack() as ending:
            for number, name in enumerate(self._names, 1):
                host = self._hosts[name] = Host(name, f"{NETWORK}.{number}")
                ending.callback(host.close)
            self._switch = self._start_switch()
            ending.callback(self._end_switch)
            self._ending = ending.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ending.close()

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    # -- the network -------------------------------------------------------------------------

    def set_line(self, source: str, target: str, line: Line) -> None:
        """How packets fare from `source` to `target`; not the other way."""
        self._order(source, target, line)

    def set_lines(self, one: str, other: str, line: Line) -> None:
        """How packets fare between the two, both ways."""
        self.set_line(one, other, line)
        self.set_line(other, one, line)

    def cut(self, one: str, *others: str) -> None:
        """Nothing passes any more between `one` and each of `others`."""
        for other in others:
            self.set_lines(one, other, Line(cut=True))

    def cut_one_way(self, source: str, target: str) -> None:
        """What `source` sends to `target` is lost; what comes back arrives."""
        self.set_line(source, target, Line(cut=True))

    def isolate(self, name: str) -> None:
        """Cut a host off from all others."""
        self.cut(name, *(other for other in self._names if other != name))

    def heal(self) -> None:
        """Let everything pass, at once."""
        for source in self._names:
            for target in self._names:
                if source != target:
                    self.set_line(source, target, Line())

    def traffic(self, source: str, target: str) -> Traffic:
        """What has been carried from `source` to `target`, and what has been dropped."""
        return self._order(source, target, None)

    # -- inside ------------------------------------------------------------------------------

    def _start_switch(self) -> subprocess.Popen[bytes]:
        devices = [host.device for host in self._hosts.values()]
        described = [f"{host.name}={host.device}={host.address}" for host in self._hosts.values()]
        try:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.world.switch", str(self._seed), *described],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=devices,
                process_group=0,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        finally:
            for device in devices:  # they are the switch's now, and end with it
                os.close(device)

    def _end_switch(self) -> None:
        switch = self._switch
        assert switch is not None
        assert switch.stdin is not None
        assert switch.stdout is not None
        switch.stdin.close()
        try:
            switch.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            switch.kill()
            switch.wait()
        switch.stdout.close()

    def _order(self, source: str, target: str, line: Line | None) -> Traffic:
        switch = self._switch
        assert switch is not None
        assert switch.stdin is not None
        assert switch.stdout is not None
        switch.stdin.write(msgspec.json.encode((source, target, line)) + b"\n")
        switch.stdin.flush()
        answer = switch.stdout.readline()
        assert answer, "the switch has died"
        return Traffic(*msgspec.json.decode(answer, type=tuple[int, int]))
