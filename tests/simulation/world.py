"""The simulated cluster: real leaders and real registries, and everything else made up.

No threads, no clock, no sockets: one seed decides all of it, so that a failure is a number.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from kvbm_schemas.block import HASH_BYTES, BlockHash, Tier
from kvbm_schemas.events import Loaded
from kvbm_schemas.records import RankRecord
from kvbm_service.core.journal import Journal
from kvbm_service.core.leader import Leader
from kvbm_service.core.limits import Limits
from kvbm_service.core.reads import Origin
from kvbm_service.core.registry import Registry
from kvbm_service.core.spills import SpillLimits
from tests.simulation.directory import Directory
from tests.simulation.engine import Request
from tests.simulation.network import Network
from tests.simulation.node import LOOKUP_SECONDS, STAGING_SECONDS, Node
from tests.simulation.oracles import Broken, History, Oracles, witnessed
from tests.simulation.rank import Rank
from tests.simulation.registry_host import RegistryHost
from tests.simulation.slots import Slots
from tests.simulation.timeline import Process, Timeline
from tests.simulation.weather import RATES, Weather, any_weather

TROUBLE_SECONDS = 1.0
"""How long requests come in, and things go wrong."""
QUIET_SECONDS = 4.5
"""How long everybody then has to find back to order."""
FAULT_SECONDS = 0.1
"""How often a fault may begin."""
LONGEST_STOP = 1.0
FORGOTTEN = 0.1
"""Of what is handed over."""
NEVER_BACK = 0.2
"""Of the nodes that crash."""
LONGEST_CHAIN = 6
FAMILIES = 4
"""Chains that share a head belong to one family."""


@cache
def block_name(*path: int) -> BlockHash:
    """The name of the block at the end of this path of the tree of all prompts."""
    return BlockHash(hashlib.sha256(repr(path).encode()).digest()[:HASH_BYTES])


class World:
    """One simulated cluster."""

    def __init__(self, seed: int, weather: Weather | None = None) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.trouble = self.weather = weather or any_weather(self.chance)
        self.limits = Limits(
            lookup_seconds=LOOKUP_SECONDS,
            lease_seconds=self.weather.lease_seconds,
            transfer_seconds=0.1,
            held_blocks=4,
            staging_seconds=STAGING_SECONDS,
            hand_over_seconds=STAGING_SECONDS,
            disk_only=self.weather.disk_only and self.weather.disk_slots > 0,
            spill=SpillLimits(batch_blocks=3, batches=2),
            min_frequency=2 if self.weather.filtered else 0,
            filter_entries=1_000,
            prefetch_share=self.weather.prefetch_share,
            lent_blocks=self.weather.lent_blocks,
        )
        self.timeline = Timeline()
        self.network = Network(self.timeline, self.chance, self.weather)
        self.directory = Directory(self.timeline)
        self.oracles = Oracles(self)
        self.agents: dict[str, Rank] = {}
        self.histories: dict[str, History] = {}
        self.nodes: dict[str, Node] = {}
        self.registries: dict[str, RegistryHost] = {}
        self.registry_names = [f"registry{number}" for number in range(self.weather.registries)]
        self.expired_leases = 0
        self.tokens: set[str] = set()
        """Of blocks that were handed over."""
        self.restarts = 0
        self.blocks: Counter[str] = Counter()
        """Blocks that were loaded, by how it went: own, disk, remote, failed."""
        self.adopted: Counter[Tier] = Counter()
        """Blocks of earlier lives that were found again."""
        self.told: Counter[str] = Counter()
        """What ranks were told to do."""
        self.unheard = 0
        self._memory: dict[tuple[str, int], dict[Tier, Slots]] = {}
        self.all_blocks: list[BlockHash] = []
        """Every block that any prompt had."""
        self._nature = Process()
        self._names = [f"node{number}" for number in range(self.weather.nodes)]
        for name in self.registry_names:
            self._start_registry(name)
        for name in self._names:
            self._start_node(name)

    def run(self) -> None:
        """Live through the trouble, then let it pass, and see that all is well."""
        for number in range(self.weather.requests):
            delay = 0.1 + self.chance.random() * (TROUBLE_SECONDS - 0.1)
            self.timeline.after(delay, self._nature, lambda n=number: self._submit(n))  # type: ignore[misc]
        self.timeline.every(FAULT_SECONDS, self._nature, self._maybe_fault)
        self.timeline.run(TROUBLE_SECONDS)
        self._heal()
        self.timeline.run(TROUBLE_SECONDS + LONGEST_STOP + QUIET_SECONDS)
        self.oracles.all_is_quiet()

    def check(self, good: bool, otherwise: str) -> None:
        """Stop the world if an oracle is not content."""
        if not good:
            raise Broken(
                f"{otherwise} (at {self.timeline.now:.3f} s; "
                f"python -m tests.simulation.replay {self.seed})"
            )

    # -- what the inhabitants need -----------------------------------------------------------

    def make_leader(self, ranks: tuple[RankRecord, ...], instance: str) -> Leader:
        """A leader for a new life of a node."""
        return Leader(ranks, self.limits, instance)

    def new_instance(self, node: str) -> str:
        """A name for a life that no life ever had."""
        return f"{node}/{self.restarts}"

    def memory(self, node: str, rank: int, fresh: bool = False) -> dict[Tier, Slots]:
        """The tiers of a rank for a new life, with what an earlier one left in them.

        `fresh`: that one still has them.
        """
        weather = self.weather
        tiers = {Tier.HOST: Slots(weather.host_slots)}
        if weather.disk_slots:
            tiers[Tier.DISK] = Slots(weather.disk_slots)
        for tier, slots in self._memory.get((node, rank), {}).items():
            lasts = tier is Tier.DISK or weather.host_survives
            if lasts and not (slots.forgotten or fresh):
                tiers[tier] = slots
        self._memory[node, rank] = tiers
        return tiers

    @property
    def leases_are_ample(self) -> bool:
        """Whether everything that is done under a lease takes less than that."""
        weather = self.trouble
        slowness = weather.disk_slowness if weather.disk_slots else 1.0
        copying = 2 * LONGEST_CHAIN * weather.copy_seconds * slowness
        return self.longest_wait + copying < weather.lease_seconds

    @property
    def longest_wait(self) -> float:
        """How long an engine may be told to ask again."""
        waits = self.weather.disk_slots or self.weather.hand_overs
        staging = self.limits.staging_seconds if waits else 0.0
        return 2 * self.limits.lookup_seconds + staging

    def make_registry(self) -> Registry:
        """A registry for a new life of a registry service."""
        return Registry(seed=self.seed)

    def witness(self, node: str, journal: Journal) -> Journal:
        """`journal`, with the node's history written alongside."""
        return witnessed(journal, self.histories.setdefault(node, History()))

    def new_agent(self, rank: Rank, name: str) -> str:
        """A name that no agent ever had."""
        agent = f"{name}/{len(self.agents)}"
        self.agents[agent] = rank
        return agent

    def new_token(self, node: str) -> str:
        """A name for a lease granted ahead."""
        token = f"{node}-ahead-{len(self.tokens):016}"
        self.tokens.add(token)
        return token

    def handed_over(self, request: Request, origin: Origin) -> None:
        """Somebody routes a request from a prefill engine to a decode engine, or forgets it."""
        self.told["hand-overs"] += 1
        if self.chance.random() < FORGOTTEN:
            return
        node = self.nodes[self.chance.choice(self._names)]
        chain = list(request.chain)
        if self.chance.random() < 0.3:
            chain.append(block_name(*chain[-1], 0))
            self.all_blocks += [block for block in chain if block not in self.all_blocks]
        decode = Request(f"{request.name}'", chain, origin=origin)

        def submit() -> None:
            if node.process.alive and node.ready and self.nodes[node.name] is node:
                node.engine.submit(decode)

        self.timeline.after(self.chance.random() * 0.05, self._nature, submit)

    def copy_fails(self) -> bool:
        """Whether bad luck strikes a copy."""
        return self.chance.random() < self.weather.copy_failure

    def count_loaded(self, node: str, loaded: Loaded) -> None:
        """A load has ended."""
        self.blocks["failed"] += loaded.failed
        for source in loaded.sources:
            own = "disk" if source.tier is Tier.DISK else "own"
            self.blocks[own if source.node == node else "remote"] += source.blocks

    def stop(self, process: Process) -> None:
        """`process` stops for a while, perhaps for longer than its leases."""
        process.wakes_at = self.timeline.now + self.chance.random() * LONGEST_STOP

    # -- what happens to them ----------------------------------------------------------------

    def _submit(self, number: int) -> None:
        """A user sends a prompt to some engine."""
        chance = self.chance
        family = chance.randrange(FAMILIES)
        path = [family] * chance.randint(2, LONGEST_CHAIN)
        if chance.random() < 0.5:
            path[-1] = FAMILIES + chance.randrange(4)
        chain = [block_name(*path[: end + 1]) for end in range(len(path))]
        self.all_blocks += [block for block in chain if block not in self.all_blocks]
        node = self.nodes[chance.choice(self._names)]
        if node.process.alive and node.ready:
            request = Request(f"r{number}", chain)
            if self.weather.hand_overs:
                request.prefill_only = chance.random() < self.weather.hand_overs
            node.engine.submit(request)

    def _maybe_fault(self) -> None:
        weather = self.weather
        for name in self._names:
            if self._strikes(weather.stops):
                self._stop_something(self.nodes[name])
            if self._strikes(weather.outages):
                self._outage(self.nodes[name])
            if self._strikes(weather.crashes):
                self._crash_node(name)
            self._maybe_spoil_disk(self.nodes[name])
            self._maybe_strike_rank(self.nodes[name])
        if self._strikes(weather.partitions):
            self._partition()
        for name in self.registry_names:
            if self._strikes(weather.stops):
                self.stop(self.registries[name].process)
            if self._strikes(weather.registry_crashes):
                self._crash_registry(name)

    def _strikes(self, rate: float) -> bool:
        return rate > 0 and self.chance.random() < rate * FAULT_SECONDS

    def _stop_something(self, node: Node) -> None:
        """One of a node's processes stops for a while."""
        self.stop(self.chance.choice([node.process, *(rank.process for rank in node.ranks)]))

    def _maybe_spoil_disk(self, node: Node) -> None:
        rank = self.chance.choice(node.ranks)
        disk = rank.tiers.get(Tier.DISK)
        if disk is not None and self._strikes(self.weather.decay):
            disk.decay(self.chance.randrange(len(disk.contents)))
        if disk is not None and self._strikes(self.weather.disk_losses):
            rank.disk_lost = "I/O error"
            self.told["lost disks"] += 1

    def _outage(self, node: Node) -> None:
        node.online = False

        def back() -> None:
            node.online = True

        self.timeline.after(self.chance.random(), self._nature, back)

    def _partition(self) -> None:
        places = [*self.network.places, "directory"]
        pair = frozenset(self.chance.sample(places, 2))
        self.network.cut.add(pair)
        self.timeline.after(
            self.chance.random(), self._nature, lambda: self.network.cut.discard(pair)
        )

    def _crash_node(self, name: str) -> None:
        node = self.nodes[name]
        if not node.process.alive:
            return
        node.crash()
        if self.chance.random() < NEVER_BACK:
            return
        delay = self.chance.random() ** 2
        self.timeline.after(delay, self._nature, lambda: self._start_node(name))

    def _maybe_strike_rank(self, node: Node) -> None:
        if self._strikes(self.weather.rank_losses):
            self._lose_rank(node)
        if self._strikes(self.weather.unseen_ranks):
            self._hide_rank(node)

    def _lose_rank(self, node: Node) -> None:
        """A rank is killed, or stops; before long another process takes its place."""
        rank = self.chance.choice(node.ranks)
        if not (node.process.alive and node.ready and rank.process.alive) or rank.given_up:
            return
        self.told["lost ranks"] += 1
        rank.given_up = True
        if self.chance.random() < 0.7:
            rank.process.alive = False
        else:
            self.stop(rank.process)
        if self.chance.random() < 0.5:
            self._unless_replaced(node, rank, 0.1, lambda: node.rank_lost(rank.number))
        delay = 0.1 + self.chance.random() * 0.5
        self._unless_replaced(node, rank, delay, lambda: node.replace_rank(rank.number))

    def _unless_replaced(
        self, node: Node, rank: Rank, delay: float, do: Callable[[], None]
    ) -> None:
        def then() -> None:
            if node.process.alive and node.ranks[rank.number] is rank:
                do()

        self.timeline.after(delay, node.process, then)

    def _hide_rank(self, node: Node) -> None:
        """A rank goes on, but the directory does not list it for a while."""
        number = self.chance.randrange(len(node.ranks))
        if node.process.alive:
            node.rank_unseen(number, unseen=True)
            self.timeline.after(
                self.chance.random(), node.process, lambda: node.rank_unseen(number, unseen=False)
            )

    def _crash_registry(self, name: str) -> None:
        self.registries[name].process.alive = False
        self.timeline.after(
            self.chance.random() * 0.3, self._nature, lambda: self._start_registry(name)
        )

    def _start_node(self, name: str) -> None:
        self.restarts += name in self.nodes
        node = self.nodes[name] = self.network.places[name] = Node(self, name)
        for rank in node.ranks:
            self.network.places[rank.name] = rank

    def _start_registry(self, name: str) -> None:
        if name in self.registries and self.registries[name].process.alive:
            return
        self.registries[name] = self.network.places[name] = RegistryHost(self, name)

    def _heal(self) -> None:
        """From here on nothing goes wrong any more; what began will end."""
        calm = Weather()
        ended = {rate: getattr(calm, rate) for rate in RATES}
        self.weather = self.network.weather = replace(self.trouble, **ended)
