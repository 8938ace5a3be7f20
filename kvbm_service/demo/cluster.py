"""What two engines need to find each other, on this host: NATS and a registry, to be killed and
restarted at will."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from kvbm_schemas.codec import encode
from kvbm_schemas.requests import Locate
from kvbm_schemas.subjects import REGISTRY_NODE, Scope
from kvbm_service.adapters.embedded_server import mortal
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_server import EmbeddedNats
from kvbm_service.demo.process_group import end_group
from kvbm_service.errors import BusError, KvbmError

START_SECONDS = 60.0


class Cluster:
    """An embedded NATS server, and a registry in a process of its own; their state in `folder`.

    `environment` is added to the registry's.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._environment = dict(environment or {})
        self._folder = folder
        self.nats_folder = folder / "nats"
        self.nats = EmbeddedNats(store_dir=self.nats_folder)
        self._registry: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """For KVBM_NATS_URL."""
        return self.nats.url

    @property
    def registry_pid(self) -> int | None:
        """The registry's process, while there is one."""
        return self._registry.pid if self._registry else None

    def start_registry(self) -> None:
        """Start one, and wait until it answers.

        Raises:
            KvbmError: it ended instead, or did not answer in time.
        """
        assert self._registry is None
        log = self._folder / "registry.log"
        with log.open("ab") as output:
            self._registry = subprocess.Popen(
                mortal(
                    [sys.executable, "-m", "kvbm_service.cli", "registry", "--nats-url", self.url]
                ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | self._environment,
            )
        deadline = time.monotonic() + START_SECONDS
        while not asyncio.run(_answers(self.url)):
            if self._registry.poll() is not None or time.monotonic() > deadline:
                raise KvbmError(f"the registry does not answer:\n{log.read_text()[-2000:]}")

    def kill_registry(self) -> None:
        """Kill -9 it."""
        if self._registry is not None:
            end_group(self._registry.pid)
            self._registry.wait()
            self._registry = None

    def __enter__(self) -> Self:
        self.nats.start()
        try:
            self.start_registry()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill_registry()
        self.nats.close()


async def _answers(url: str) -> bool:
    bus = await NatsBus.connect(url, name="kvbm waiting for a registry")
    try:
        subject = Scope("anyone", "there").of(REGISTRY_NODE, "locate")
        with contextlib.suppress(BusError):
            await bus.request(subject, encode(Locate(hashes=b"")), 0.5)
            return True
        await asyncio.sleep(0.1)  # nobody listens there yet
        return False
    finally:
        await bus.close()
