"""What must always hold in the simulated world, and what must hold once it is quiet again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvbm_schemas import step
from kvbm_schemas.block import BlockHash, Tier, unpack
from kvbm_schemas.events import BlockEvent, Stored
from kvbm_service.core.columns import unpack_u32
from kvbm_service.core.journal import Journal

if TYPE_CHECKING:
    from tests.simulation.node import Node
    from tests.simulation.registry_host import RegistryHost
    from tests.simulation.world import World

Moment = tuple[int, int]
"""(epoch, seq)"""

SNAPSHOTS_PER_LIFE = 1
"""On a perfect network a registry asks a leader for its blocks this often: when they meet."""


class Broken(AssertionError):
    """An oracle has seen what must not be."""


class History:
    """What a node held at each moment, whatever of it was ever published."""

    def __init__(self) -> None:
        self.states: dict[Moment, frozenset[BlockHash]] = {}
        self._held: set[BlockHash] = set()

    def changed(
        self, journal: Journal, add: Sequence[BlockHash] = (), drop: Sequence[BlockHash] = ()
    ) -> None:
        """Event (epoch, seq) has happened."""
        self._held.difference_update(drop)
        self._held.update(add)
        self.states[journal.epoch, journal.seq] = frozenset(self._held)

    def begun(self, journal: Journal) -> None:
        """A life begins with nothing; what is there already counts as its event 1."""
        self.states[journal.epoch, 0] = frozenset()
        self.changed(journal)

    def restart(self) -> None:
        """The process is a new one: its memory is empty."""
        self._held.clear()

    def cleared(self, journal: Journal) -> None:
        """Nothing is held any more."""
        self._held.clear()
        self.changed(journal)


def witnessed(journal: Journal, history: History) -> Journal:
    """The same journal, with `history` written alongside."""
    kind = type(journal)

    class Witnessed(kind):  # type: ignore[valid-type, misc]
        def begin(self, epoch: int, *, empty: bool) -> None:
            super().begin(epoch, empty=empty)
            history.begun(self)

        def stored(self, blocks: Sequence[BlockHash], tier: Tier = Tier.HOST) -> None:
            super().stored(blocks, tier)
            history.changed(self, add=blocks)

        def removed(self, blocks: Sequence[BlockHash], tier: Tier = Tier.HOST) -> None:
            super().removed(blocks, tier)
            history.changed(self, drop=blocks)

        def cleared(self) -> None:
            super().cleared()
            history.cleared(self)

    history.restart()
    return Witnessed()


class Oracles:
    """Looks at everything, knows everything, and is asked by nobody but the world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._cursors: dict[tuple[RegistryHost, str], Moment] = {}

    # -- always ----------------------------------------------------------------------------

    def slots_are_free(self, node: Node, commands: step.StepCommands) -> None:
        """Nothing that is leased, or being read by the own ranks, is about to be overwritten."""
        saved = {slot for save in commands.saves for slot in unpack_u32(save.slots)}
        if not saved:
            return
        leader = node.leader
        kept = {slot for slots in leader.leases._slots.values() for slot in slots}
        kept.update(slot for load in leader._loads.values() for slot in load.plan.local_slots)
        for reader in leader._readers.values():
            if reader.plan is not None:
                kept.update(reader.plan.local_slots)
        self._world.check(not saved & kept, f"{node.name} overwrites slots that are in use")

    def event_is_true(self, node: Node, event: BlockEvent) -> None:
        """A block that is said to be stored is there, whole, on every rank."""
        if not isinstance(event, Stored):
            return
        pool = node.leader.pool
        for name in unpack(event.hashes):
            slot = pool._ready.get(name)
            if slot is None:
                continue  # gone again within the same step
            for rank in node.ranks:
                header = rank.headers[slot]
                right = header is not None and header[0] == rank.slots[slot] == name
                self._world.check(right, f"{node.name} tells of a block that is not there")

    def member_left(self, host: RegistryHost, node: str) -> None:
        """`host` starts anew with `node`."""
        self._cursors.pop((host, node), None)

    def view_is_a_past(self, host: RegistryHost, node: str) -> None:
        """What a registry believes of a node was true at its cursor, and the cursor moves on."""
        moment = host.cursor(node)
        if moment is None:
            return
        before = self._cursors.get((host, node), moment)
        self._world.check(moment >= before, f"{host.name}'s cursor of {node} went back")
        self._cursors[host, node] = moment
        state = self._world.histories[node].states.get(moment)
        self._world.check(
            state == host.view(node), f"{host.name} sees {node} as it was not at {moment}"
        )

    # -- in the end ------------------------------------------------------------------------

    def all_is_quiet(self) -> None:
        """With nothing to do, and time passed: everything is given back, and known."""
        for node in self._world.nodes.values():
            if node.process.alive:
                self._nothing_leaks(node)
        for host in self._world.registries.values():
            for name, node in self._world.nodes.items():
                held = node.leader.pool.blocks() if node.process.alive else ()
                truth = frozenset(held)
                self._world.check(
                    host.view(name) == truth, f"{host.name} does not know what {name} holds"
                )
        self._messages_stay_within_budget()

    def _nothing_leaks(self, node: Node) -> None:
        leader, check = node.leader, self._world.check
        leader.check_integrity()
        check(not node.engine.requests, f"{node.name}: requests hang: {list(node.engine.requests)}")
        check(not leader.busy and not leader.holds_device_blocks, f"{node.name} is still busy")
        check(node.engine.pool.in_use == 0, f"{node.name} lost device blocks")
        check(leader.pool.pinned == 0, f"{node.name} still pins slots")
        check(leader.pool.used == len(leader.pool), f"{node.name} lost slots")
        check(len(leader.leases) == 0, f"{node.name} still leases")
        check(not leader._readers, f"{node.name} still follows requests")

    def _messages_stay_within_budget(self) -> None:
        """On a perfect network nobody asks for snapshots in vain, and no lease has to run out."""
        world = self._world
        if not world.trouble.calm:
            return
        budget = SNAPSHOTS_PER_LIFE * len(world.nodes) * len(world.registries)
        asked = world.network.sent.get("Resync", 0)
        world.check(asked <= budget, f"{asked} snapshots were asked for on a perfect network")
        if not world.trouble.duplication:  # a question heard twice is answered with two leases
            world.check(world.expired_leases == 0, "leases had to run out on a perfect network")
