"""Where chaos happens: NATS, registries and nodes, all real, and a witness of what they say."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

from kvbm_schemas.block import unpack
from kvbm_schemas.events import Removed, Stored
from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.embedded_server import EmbeddedServer
from kvbm_service.adapters.etcd_server import EmbeddedEtcd, etcd_binary
from kvbm_service.adapters.nats_server import EmbeddedNats
from kvbm_service.demo.engine import Engine, EngineOptions, share_cores
from kvbm_service.errors import DirectoryError
from tests.chaos.judges import (
    LOOKUP_SECONDS,
    STAGING_SECONDS,
    TRANSFER_SECONDS,
    Heard,
    untruth,
)
from tests.chaos.member import Member
from tests.chaos.passage import Passages
from tests.chaos.questions import Conversation, conversations
from tests.chaos.registry import RegistryProcess
from tests.chaos.wall_clock import WallClock
from tests.integration.conftest import Reference
from tests.integration.node import node_options
from tests.integration.witness import Witness

MEMBERSHIP_SECONDS = 6.0
LEASE_SECONDS = 5.0
START_SECONDS = 300.0
REGISTRIES = 2
HOST_BLOCKS = 48
DISK_BLOCKS = 96
SETTINGS = {
    "KVBM_VERIFY": False,  # as users run it: what is doubtful is found out without
    "KVBM_LOOKUP_DEADLINE_MS": LOOKUP_SECONDS * 1e3,
    "KVBM_STAGING_DEADLINE_MS": STAGING_SECONDS * 1e3,
    "KVBM_TRANSFER_TIMEOUT_SECONDS": TRANSFER_SECONDS,
    "KVBM_MEMBERSHIP_SECONDS": MEMBERSHIP_SECONDS,
    "KVBM_LEASE_SECONDS": LEASE_SECONDS,
    "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": HOST_BLOCKS,
}


class Kind(NamedTuple):
    """What a node of the arena is like."""

    name: str
    ranks: int = 1
    disk: bool = False


NODES = (Kind("ann"), Kind("bob", disk=True), Kind("wim", ranks=2, disk=True))
"""Ann and Bob share blocks. Wim has two ranks, and so other blocks, which he keeps to himself."""


def has_etcd() -> bool:
    """Whether there is an etcd to be run here."""
    with contextlib.suppress(DirectoryError):
        return etcd_binary().exists()
    return False


class Arena:
    """Everything that can be struck. A context manager: at its end no process is left."""

    def __init__(
        self, model: Path, folder: Path, say: Callable[[str], None], *, on_etcd: bool = False
    ) -> None:
        """`on_etcd`: members meet in an etcd of the arena's own, rather than in NATS."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.talks: Sequence[Conversation] = ()
        self.members: dict[str, Member] = {}
        self.registries: dict[str, RegistryProcess] = {}
        self.scopes: dict[str, Scope] = {}
        """Of each node."""
        self._model = model
        self._say = say
        # In memory, since each renewal of a lease waits for the disk, which others use, too.
        self.memory = Path(tempfile.mkdtemp(prefix="kvbm-chaos-", dir="/dev/shm"))
        self.nats = EmbeddedNats(store_dir=self.memory / "nats")
        self.etcd = EmbeddedEtcd(store_dir=self.memory / "etcd") if on_etcd else None
        self._ending = ExitStack()
        self._heard = Heard(set(), [])
        self._heard_until = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._prepare(stack)
            self._ending = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.close()

    def _prepare(self, stack: ExitStack) -> None:
        self._say("starting NATS, registries, three engines and one to compare with …")
        began = time.monotonic()
        stack.callback(shutil.rmtree, self.memory)
        servers = [self.nats, *filter(None, [self.etcd])]
        for server in servers:
            stack.callback(server.close)
            server.start()
        passages = stack.enter_context(Passages())
        self._start_registries(stack)
        self.witness = Witness(self.nats.url, MEMBERSHIP_SECONDS, self._directory_url)
        stack.callback(self.witness.close)
        beginning = self.witness.listen()
        cores = iter(share_cores(engines=sum(kind.ranks for kind in NODES)))
        for kind in NODES:
            own = "|".join(next(cores) for _ in range(kind.ranks))
            self.members[kind.name] = member = self._make(kind, passages, own)
            stack.callback(member.end)
        self.talks = self._right_answers()
        for name, member in self.members.items():
            if not member.wait_up(START_SECONDS):
                raise AssertionError(f"{name} does not start: {member.engine.what_went_wrong()}")
            self.scopes[name] = beginning.scope(name)
        self._say(f"all are there after {time.monotonic() - began:.0f} s")

    def _start_registries(self, stack: ExitStack) -> None:
        environment = {
            "KVBM_MEMBERSHIP_SECONDS": str(MEMBERSHIP_SECONDS),
            "KVBM_DIRECTORY_URL": self._directory_url,
        }
        for number in range(1, REGISTRIES + 1):
            name = f"registry-{number}"
            clock = WallClock(self.folder / f"{name}.clock")
            log = self.folder / f"{name}.log"
            registry = RegistryProcess(name, self.nats.url, log, environment, clock)
            stack.callback(registry.kill)
            registry.start()
            self.registries[name] = registry

    def _make(self, kind: Kind, passages: Passages, cores: str) -> Member:
        to_nats = passages.to(self.nats.port)
        to_etcd = passages.to(self.etcd.port) if self.etcd else None
        clock = WallClock(self.folder / f"{kind.name}.clock")
        connector: dict[str, object] = dict(SETTINGS)
        if to_etcd:
            connector["KVBM_DIRECTORY_URL"] = f"etcd://127.0.0.1:{to_etcd.port}"
        if kind.disk:
            connector |= {
                "KVBM_HOST_CACHE_DIR": str(self.memory),
                "DYN_KVBM_DISK_CACHE_DIR": str(self.folder / f"{kind.name}-disk"),
                "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": DISK_BLOCKS,
                "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": True,  # it is to be busy
            }
            (self.folder / f"{kind.name}-disk").mkdir(exist_ok=True)

        def options(life: int) -> EngineOptions:
            made = node_options(
                self._model,
                self.folder / f"{kind.name}-{life}.log",
                f"nats://127.0.0.1:{to_nats.port}",
                kind.name,
                ranks=kind.ranks,
                cores=cores,
                connector=connector,
            )
            return dataclasses.replace(
                made, environment=dict(made.environment) | dict(clock.environment)
            )

        ways = (to_nats, to_etcd) if to_etcd else (to_nats,)
        return Member(kind.name, options, self.witness, ways, clock, kind.ranks, kind.disk)

    def _right_answers(self) -> list[Conversation]:
        """Have an engine without any cache answer everything, and end it."""
        log = self.folder / "reference.log"
        engine = Engine(EngineOptions(model=self._model, log=log, device_blocks=64))
        try:
            return conversations(Reference(engine))
        finally:
            engine.kill()

    # -- what is struck, beside members and registries -------------------------------------------

    @property
    def clocks(self) -> dict[str, WallClock]:
        """The wall clock of each member and registry."""
        members = {name: member.clock for name, member in self.members.items()}
        return members | {name: registry.clock for name, registry in self.registries.items()}

    @property
    def servers(self) -> dict[str, EmbeddedServer]:
        """NATS, and etcd where members meet there."""
        return {server.NAME: server for server in (self.nats, self.etcd) if server}

    @property
    def _directory_url(self) -> str:
        return self.etcd.url if self.etcd else ""

    # -- what is seen ----------------------------------------------------------------------------

    def wait_up(self) -> list[str]:
        """Wait until all members take part; returns those that do not."""
        deadline = time.monotonic() + START_SECONDS
        return [
            name
            for name, member in self.members.items()
            if not member.wait_up(max(0.0, deadline - time.monotonic()))
        ]

    def untruth(self) -> str:
        """How some registry's view differs from what the nodes hold; "" if it does not."""
        return untruth(self.witness, self.scopes, self._hear)

    def _hear(self) -> Heard:
        """What nodes have told of so far."""
        for heard in self.witness.since(self._heard_until):
            self._heard_until += 1
            if isinstance(heard.message, Stored | Removed):
                blocks = unpack(heard.message.hashes)
                self._heard.told.extend(blocks)
                if isinstance(heard.message, Stored):
                    self._heard.ever.update(blocks)
        return self._heard
