"""What must always hold in the simulated world, and what must hold once it is quiet again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kvbm_schemas import step
from kvbm_schemas.block import BlockHash, Tier, unpack
from kvbm_schemas.events import BlockEvent, Stored
from kvbm_schemas.requests import LeaseAnswer, Leased
from kvbm_service.core.columns import unpack_u32, unpack_u64
from kvbm_service.core.crew import State
from kvbm_service.core.journal import Journal
from kvbm_service.core.pool import Pool
from tests.simulation.demand import Demand
from tests.simulation.doubts import Doubts, Spot
from tests.simulation.slots import Label

if TYPE_CHECKING:
    from tests.simulation.node import Node
    from tests.simulation.registry_host import RegistryHost
    from tests.simulation.world import World

Moment = tuple[int, int]
"""(epoch, seq)"""

Copy = tuple[BlockHash, Tier]
"""A block in a tier."""

Place = tuple[Tier, int]
"""A slot of a tier."""

SNAPSHOTS_PER_LIFE = 1
"""On a perfect network a registry asks a leader for its blocks this often: when they meet."""


class Broken(AssertionError):
    """An oracle has seen what must not be."""


class History:
    """What a node held at each moment, whatever of it was ever published."""

    def __init__(self) -> None:
        self.states: dict[Moment, frozenset[Copy]] = {}
        self._held: set[Copy] = set()

    def changed(
        self, journal: Journal, add: Iterable[Copy] = (), drop: Iterable[Copy] = ()
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
            history.changed(self, add=[(block, tier) for block in blocks])

        def removed(self, blocks: Sequence[BlockHash], tier: Tier = Tier.HOST) -> None:
            super().removed(blocks, tier)
            history.changed(self, drop=[(block, tier) for block in blocks])

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
        self._demand: dict[Node, Demand] = {}
        self._doubts: dict[Node, Doubts] = {}

    # -- always ----------------------------------------------------------------------------

    def commands_are_right(self, node: Node, commands: step.StepCommands) -> None:
        """What ranks are told is within the rules, and spoils nothing that is in use."""
        told = self._world.told
        told["spills"] += len(commands.spills)
        told["saves"] += len(commands.saves)
        told["fetches"] += len(commands.fetches)
        told["remote fetches"] += len(commands.remote_fetches)
        told["disk loads"] += sum(load.disk is not None for load in commands.loads)
        self.slots_are_free(node)
        self._disk_is_used_as_wanted(node, commands)
        self._demand_of(node).told(commands)
        self._doubts_of(node).told(commands)

    def fetch_is_right(self, node: Node, fetch: step.Fetch) -> None:
        """Likewise for what does not ride a step."""
        self._world.told["fetches by bus"] += 1
        self._doubts_of(node).told_to_fetch(fetch)
        self.slots_are_free(node)

    def reported(self, node: Node, results: step.StepResults) -> None:
        """A rank tells the leader what it has finished."""
        self._demand_of(node).reported(results)
        self._doubts_of(node).reported(results)

    def slots_are_free(self, node: Node) -> None:
        """What is leased, read or planned with is not to be overwritten, nor written to twice."""
        leader = node.leader
        moves = [one.move for one in leader.orders.moves._open.values()]
        targets = Counter((move.tier, slot) for move in moves for slot in move.slots)
        twice = [place for place, count in targets.items() if count > 1]
        self._world.check(not twice, f"{node.name} fills a slot with two blocks")
        kept: set[Place] = set()
        for slots in leader.lending.leases._slots.values():
            kept.update((Tier.HOST, slot) for slot in slots)
        plans = [load.order.plan for load in leader.loads._open.values()]
        plans += [reader.plan for reader in leader.lookups.readers.values() if reader.plan]
        for plan in plans:
            kept.update((pinned.tier, slot) for pinned in plan.pinned for slot in pinned.slots)
        for move in moves:
            if move.pinned is not None:
                tier, read = move.pinned
                kept.update((tier, slot) for slot in read)
        self._world.check(
            not targets.keys() & kept, f"{node.name} overwrites slots that are in use"
        )

    def _disk_is_used_as_wanted(self, node: Node, commands: step.StepCommands) -> None:
        check, limits = self._world.check, self._world.limits
        to = Tier.DISK if limits.disk_only else Tier.HOST
        check(all(save.tier is to for save in commands.saves), f"{node.name} saves elsewhere")
        if any(rank.told_disk_lost for rank in node.ranks):
            again = self._doubts_of(node).fetches
            fresh = [fetch for fetch in commands.fetches if fetch.op not in again]
            used = commands.spills or fresh or (limits.disk_only and commands.saves)
            check(not used, f"{node.name} uses a disk that is lost")
        if limits.min_frequency and not limits.disk_only:
            demand = self._demand_of(node)
            for spill in commands.spills:
                wanted = [demand.frequency(block) for block in unpack(spill.hashes)]
                check(
                    min(wanted) >= limits.min_frequency,
                    f"{node.name} puts a block on disk that nobody wants",
                )

    def moved(self, node: Node, moved: step.Moved) -> None:
        """Likewise, by the bus."""
        self._doubts_of(node).moved(moved)

    def _doubts_of(self, node: Node) -> Doubts:
        return self._doubts.setdefault(node, Doubts())

    def _demand_of(self, node: Node) -> Demand:
        return self._demand.setdefault(node, Demand(len(node.ranks)))

    def reads_are_leased(self, node: Node) -> None:
        """Each read of another node's slots has a lease that was not given back."""
        leased = Counter(
            (owner, tier, slot) for owner, tier, slots in node.borrowed.values() for slot in slots
        )
        for rank in node.ranks:
            if rank.given_up:
                continue  # nobody believes what it reads
            right = all(count <= leased[place] for place, count in rank.pulling.items())
            self._world.check(right, f"{node.name} reads without a lease")

    def lease_is_true(self, node: Node, hashes: bytes, answer: LeaseAnswer) -> None:
        """Blocks that another node may read are there, on every rank."""
        if isinstance(answer, Leased):
            self.nothing_is_promised(node, 1)
            slots, fills = unpack_u32(answer.slots), unpack_u64(answer.fills)
            self._world.told[f"leases in {answer.tier}"] += 1
            for name, slot, fill in zip(unpack(hashes), slots, fills, strict=False):
                right = self._is_lent(node, answer.tier, slot, Label(name, fill))
                self._world.check(right, f"{node.name} lends a block that is not there")

    def _is_lent(self, node: Node, tier: Tier, slot: int, label: Label) -> bool:
        if tier is not Tier.DEVICE:
            return self._is_there(node, tier, slot, label)
        return all(
            rank.lent.get(slot) == label and rank.device[slot] == label.name for rank in node.ranks
        )

    def adopted_is_there(self, node: Node) -> None:
        """What was taken over from an earlier life is there, and nothing that was to be gone."""
        self._holds_what_it_says(node, f"{node.name} has adopted what is not there")
        self._world.check(
            not node.nothing_is_left or node.leader.tiers.empty,
            f"{node.name} has found blocks that were to be forgotten",
        )

    def salvaged_is_there(self, node: Node) -> None:
        """After the loss of a rank, what is kept is there on all of them."""
        self._world.told["salvages"] += 1
        self._world.told["salvaged blocks"] += len(_copies(node))
        self._holds_what_it_says(node, f"{node.name} keeps what a rank has lost")
        # What one could not read may be among it: it will find that out again.
        self._doubts_of(node).spots.clear()

    def nothing_is_promised(self, node: Node, found: int | None) -> None:
        """A node that lacks a rank has nothing to give."""
        self._world.check(
            node.leader.crew.state is State.WHOLE or not found,
            f"{node.name} promises without all its ranks",
        )

    def _holds_what_it_says(self, node: Node, otherwise: str) -> None:
        for tier, pool in node.leader.tiers._pools:
            for name, slot in _readable(pool).items():
                label = Label(name, pool._fills[slot])
                self._world.check(self._is_there(node, tier, slot, label), otherwise)

    def _is_there(self, node: Node, tier: Tier, slot: int, label: Label) -> bool:
        """Whether every rank has written this, be it damaged since or not."""
        slots = [rank.tiers[tier] for rank in node.ranks]
        return all(
            rank.labels[slot] == label and rank.checksums[slot] == label.name for rank in slots
        )

    def event_is_true(self, node: Node, event: BlockEvent) -> None:
        """A block that is said to be stored is there, whole, on every rank."""
        if not isinstance(event, Stored) or not node.leader.tiers.has(event.tier):
            return
        pool = node.leader.tiers.pool(event.tier)
        for name in unpack(event.hashes):
            slot = pool.slot(name)
            if slot is None:
                continue  # gone again within the same step
            right = self._is_there(node, event.tier, slot, Label(name, pool._fills[slot]))
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
                truth = _copies(node) if node.process.alive else frozenset()
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
        check(len(leader.orders.moves) == 0, f"{node.name} still moves blocks")
        for tier, pool in leader.tiers._pools:
            check(pool.pinned == 0, f"{node.name} still pins slots in {tier}")
            check(pool.used == len(pool), f"{node.name} lost slots in {tier}")
        check(len(leader.lending.leases) == 0, f"{node.name} still leases")
        check(len(leader.hand_overs) == 0, f"{node.name} still keeps what it handed over")
        lent = any(rank.lent for rank in node.ranks)
        check(not lent, f"{node.name} still lends device blocks")
        check(not leader.lending._staged and not node._asking, f"{node.name} owes an answer")
        check(leader.prefetch._brought == 0, f"{node.name} lost some of what it may prefetch")
        check(not leader.prefetch._asked, f"{node.name} still waits for leases to prefetch")
        check(not leader.lookups.readers, f"{node.name} still follows requests")
        self._holds_what_it_says(node, f"{node.name} does not hold what it says")
        held = {
            Spot(tier, slot, pool._fills[slot])
            for tier, pool in leader.tiers._pools
            for slot in _readable(pool).values()
        }
        doubted = held & self._doubts_of(node).spots
        check(not doubted, f"{node.name} believes what could not be read")
        lost = any(rank.told_disk_lost for rank in node.ranks)
        check(not (lost and leader.tiers.disk), f"{node.name} still has a disk that is lost")

    def _messages_stay_within_budget(self) -> None:
        """On a perfect network nobody asks for snapshots in vain, and no lease has to run out."""
        world = self._world
        if not world.trouble.calm:
            return
        budget = SNAPSHOTS_PER_LIFE * len(world.nodes) * len(world.registries)
        asked = world.network.sent.get("Resync", 0)
        world.check(asked <= budget, f"{asked} snapshots were asked for on a perfect network")
        twice = world.trouble.duplication  # a question heard twice is answered with two leases
        if not twice and world.leases_are_ample:
            world.check(world.expired_leases == 0, "leases had to run out on a perfect network")


def _copies(node: Node) -> frozenset[Copy]:
    """What a node holds."""
    return frozenset(
        (block, tier) for tier, pool in node.leader.tiers._pools for block in pool.blocks()
    )


def _readable(pool: Pool) -> dict[BlockHash, int]:
    """Every block that can be read, and its slot."""
    return {block: slot for block, slot in pool._slots.items() if slot not in pool._filling}
