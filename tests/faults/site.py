"""Everything that two nodes need, each part on a host of its own, and someone who watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from kvbm_service.adapters.nats_bus import (
    CONNECT_SECONDS,
    MAX_PINGS_UNANSWERED,
    MAX_RETRY_SECONDS,
    PING_SECONDS,
)
from kvbm_service.adapters.nixl_reader import QUIET_SECONDS
from kvbm_service.core.cursor import MAX_RESYNC_SECONDS
from kvbm_service.core.peers import SHUN_SECONDS
from tests.faults.light_engine import SCOPE, Answer, Chain
from tests.faults.light_node import LightNode, chain
from tests.integration.witness import Witness
from tests.world import World
from tests.world.nats import NatsOnHost
from tests.world.registry import start_registry

MEMBERSHIP_SECONDS = 4.0
LOOKUP_SECONDS = 1.0
TRANSFER_SECONDS = 2.0
LEASE_SECONDS = 6.0
SETTINGS: dict[str, object] = {
    "lookup_deadline_seconds": LOOKUP_SECONDS,
    "transfer_timeout_seconds": TRANSFER_SECONDS,
    "membership_seconds": MEMBERSHIP_SECONDS,
    "lease_seconds": LEASE_SECONDS,
}
START_SECONDS = 60.0
SLACK_SECONDS = 15.0
"""What two slow cores, shared with others, may need beyond any deadline of ours."""
ANSWER_SECONDS = 2 * LOOKUP_SECONDS + TRANSFER_SECONDS + QUIET_SECONDS
"""When the engine knows what it has to compute: the two questions, the read, and until nothing
of the read can come late."""
NOTICE_SECONDS = PING_SECONDS * (MAX_PINGS_UNANSWERED + 1)
"""Until a connection to NATS that has silently died is given up. If it has not died but packets
were lost for less than this, TCP sends them again before that."""
HEAL_SECONDS = (
    NOTICE_SECONDS
    + MAX_RETRY_SECONDS + CONNECT_SECONDS  # a connection
    + MEMBERSHIP_SECONDS  # the record is back, and whoever watches has noticed it
    + MAX_RESYNC_SECONDS  # the registry's next question for a snapshot
)  # fmt: skip
"""From when everything passes again until the registry equals the truth, at the latest."""
SHARE_SECONDS = HEAL_SECONDS + ANSWER_SECONDS + SHUN_SECONDS
"""... and until nodes read from each other: one read may fail first, and its owner be shunned."""
POLL_SECONDS = 0.05


class Site:
    """NATS, a registry on host `registry`, nodes on `a` and `b`, a witness on `witness`.

    NATS is on host `nats`; or, with `servers`, a cluster on these hosts.
    """

    def __init__(self, world: World, folder: Path, servers: Sequence[str] = ("nats",)) -> None:
        self.world = world
        self._folder = folder
        self._seeds = iter(range(1, 1 << 20))
        hosts = [world[name] for name in servers]
        peers = hosts if len(hosts) > 1 else ()
        self.servers = [NatsOnHost(host, folder / host.name, peers) for host in hosts]
        for server in self.servers:
            server.start()
        self.url = ",".join(server.url for server in self.servers)
        log = folder / "registry.log"
        start_registry(world["registry"], self.url, log, MEMBERSHIP_SECONDS)
        self.a = self.start_node("a")
        self.b = self.start_node("b")
        self.witness = world["witness"].run(Witness, self.url, MEMBERSHIP_SECONDS)

    def start_node(self, name: str) -> LightNode:
        """Start a node on the host of that name."""
        log = self._folder / f"{name}.log"
        return LightNode(self.world[name], name, log, nats_url=self.url, **SETTINGS)

    @property
    def nodes(self) -> tuple[LightNode, LightNode]:
        return self.a, self.b

    def new_chain(self, blocks: int = 6) -> Chain:
        """A prompt that nobody was asked before."""
        return chain(next(self._seeds), blocks)

    def wait(self, what: str, holds: Callable[[], object], seconds: float) -> float:
        """Wait until it holds; returns how long that took."""
        began = time.monotonic()
        while not holds():
            took = time.monotonic() - began
            assert took < seconds, f"not within {seconds:g} s: {what}"
            time.sleep(POLL_SECONDS)
        return time.monotonic() - began

    def computed_by(self, node: LightNode, blocks: int = 6) -> Chain:
        """A prompt that `node` has computed, as everyone knows."""
        question = self.new_chain(blocks)
        assert node.ask(question).right
        self.witness.wait_until_located(SCOPE, question, node.name, START_SECONDS)
        return question

    def reads(self, reader: LightNode, owner: LightNode) -> bool:
        """Whether a prompt that `owner` has just computed is read from there."""
        answer = reader.ask(self.computed_by(owner, 2))
        assert answer.right
        return answer.remote == 2 and answer.failed == 0

    def wait_until_shared(self, seconds: float) -> float:
        """Wait until both nodes read from each other; returns how long that took."""
        return sum(
            self.wait(f"{r.name} reads from {o.name}", partial(self.reads, r, o), seconds)
            for r, o in (self.nodes, self.nodes[::-1])
        )

    def fails_to_read(self) -> bool:
        """Whether b was lent what a has just computed, and could not read it.

        False where b was not even lent it: a registry on slow cores may be late, too.
        """
        answer = self.b.ask(self.computed_by(self.a))
        self.check(answer)
        assert answer.remote == answer.failed, answer
        return answer.failed > 0

    def at_rest(self) -> bool:
        """Whether nobody holds on to anything."""
        states = [node.look() for node in self.nodes]
        return not any(state.pinned or state.leases or state.open for state in states)

    def registry_is_right(self) -> bool:
        """Whether the registry says exactly what the nodes hold."""
        held = {node.name: set(node.look().held) for node in self.nodes}
        names = sorted(set().union(*held.values()))
        found = self.witness.holders(SCOPE, names)
        return len(found) == len(names) and all(
            holders == {node for node in held if name in held[node]}
            for name, holders in zip(names, found, strict=True)
        )

    def check(self, *answers: Answer) -> None:
        """Each is what it is without a cache, and came before its deadline."""
        for answer in answers:
            assert answer.right, answer
            assert answer.seconds < ANSWER_SECONDS + SLACK_SECONDS, answer

    def heal(self) -> float:
        """Let everything pass, and see that all is well in time; returns how long that took."""
        self.world.heal()
        began = time.monotonic()
        left = HEAL_SECONDS + SLACK_SECONDS
        self.wait("the registry equals the truth", self.registry_is_right, left)
        left = SHARE_SECONDS + SLACK_SECONDS - (time.monotonic() - began)
        self.wait_until_shared(left)
        self.wait("nothing is pinned, leased or open", self.at_rest, LEASE_SECONDS + SLACK_SECONDS)
        return time.monotonic() - began


@contextmanager
def running(world: World, folder: Path, servers: Sequence[str] = ("nats",)) -> Iterator[Site]:
    """A site whose nodes read from each other."""
    site = Site(world, folder, servers)
    try:
        site.wait_until_shared(START_SECONDS)
        yield site
    finally:
        site.witness.close()
