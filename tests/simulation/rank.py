"""A simulated rank: device blocks, a host and a disk tier, and copies that take time.

All copies go on at the same time, each at its own pace: whatever order a leader counts on, it
has to wait for. What is written is looked at while it is: nobody else may touch it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from kvbm_schemas import step
from kvbm_schemas.block import BlockHash, Tier, unpack
from kvbm_schemas.message import Message
from kvbm_schemas.records import DeviceRecord, RankRecord, SlabRecord
from kvbm_service.core.columns import pack_u32, unpack_u32, unpack_u64
from kvbm_service.meant import Meant
from kvbm_service.once import Once
from tests.simulation.network import Answer
from tests.simulation.slots import TORN, Label, Slots, labels
from tests.simulation.timeline import Process

if TYPE_CHECKING:
    from tests.simulation.world import World

Tell = Callable[[step.Moved], None]
Proof = Callable[[], list[bool]]
"""Which of the blocks that were read are really those."""


class Rank:
    """One rank's memory in one life, and what it does on command."""

    def __init__(
        self, world: World, node: str, number: int, instance: str, tiers: dict[Tier, Slots]
    ) -> None:
        self.world = world
        self.number = number
        self.name = f"{node}.{number}"
        self.process = Process()
        self.agent = world.new_agent(self, f"{node}/{number}")
        self.instance = instance
        self.device = [TORN] * world.weather.device_blocks
        self.tiers = tiers
        self.survivors = [slots.survivors(tier) for tier, slots in tiers.items()]
        self.disk_lost = ""
        self.told_disk_lost = False
        self.given_up = False
        """Whether it is stopped, and another will take its place."""
        self.lent: dict[int, Label] = {}
        """Device blocks that others may read, and what their headers say."""
        self.pulling: Counter[tuple[str, Tier, int]] = Counter()
        """Other nodes' slots that are being read."""
        self._first_fill = 1 + max(slots.last_fill for slots in tiers.values())
        """Whoever stamps with less could be mistaken for an earlier life."""
        self._reading: Counter[tuple[Tier, int]] = Counter()
        self._writing: set[tuple[Tier, int]] = set()
        self.node = node
        self._known: set[str] = set()
        self._moved: list[step.Moved] = []
        self._loaded: list[step.LoadResult] = []
        self._once = Once()
        self._meant = Meant(self.record())
        self._under_way: set[int] = set()
        """Ops that have been begun and not ended."""
        self._fence = 0
        """To be answered once nothing older is under way."""

    @property
    def online(self) -> bool:
        """Whether it is on the bus."""
        return self.world.nodes[self.node].online

    def record(self) -> RankRecord:
        """What the directory says about this rank."""
        slots = len(self.tiers[Tier.HOST].contents)
        slab = SlabRecord(base=0, headers=0, slots=slots, slot_bytes=1, header_bytes=1)
        disk = self.tiers.get(Tier.DISK)
        return RankRecord(
            node=self.node,
            rank=self.number,
            world_size=self.world.weather.world_size,
            agent=self.agent,
            agent_metadata=b"",
            slab=slab,
            instance=self.instance,
            disk_slots=len(disk.contents) if disk else 0,
            device=DeviceRecord(headers=0, blocks=len(self.device), device=None, regions=()),
        )

    # -- commands and results --------------------------------------------------------------

    def begin_step(self, commands: step.StepCommands) -> None:
        """All but saves, which have to wait for the forward pass."""
        commands = self._meant.heed(commands)
        if commands.forget:
            for slots in self.tiers.values():
                slots.forgotten = True
        self._known.difference_update(commands.gone)
        self._known.update(record.agent for record in commands.peers)
        if commands.loads:
            self._maybe_nap()
        for spill in commands.spills:
            self._play(self.spill(spill), spill.op)
        for fetch in commands.fetches:
            self.fetch(fetch, self._tell_leader)
        for remote in commands.remote_fetches:
            self._play(self.fetch_remote(remote), remote.op)
        for load in commands.loads:
            self._play(self.load(load), load.op)
        self._begin_lending(commands)
        if commands.fence:
            self._meant.fence = self._fence = commands.fence
            self._maybe_rest()

    def _begin_lending(self, commands: step.StepCommands) -> None:
        for lend in commands.lends:
            self.lend(lend, self._tell_leader)
        for unlend in commands.unlends:
            self._play(self.unlend(unlend), unlend.op)

    def end_step(self, commands: step.StepCommands) -> None:
        """The forward pass is over: start saving."""
        for save in self._meant.heed(commands).saves:
            self._play(self.save(save), save.op)

    def receive(self, sender: str, message: Message, answer: Answer) -> None:
        """The own leader wants something at once."""
        if not isinstance(message, step.Fetch | step.Lend) or message.op <= self._meant.fence:
            return
        if message.instance != self.instance:
            return
        if isinstance(message, step.Fetch):
            self.fetch(message, answer)
        else:
            self.lend(message, answer)

    def take_results(self) -> step.StepResults | None:
        """What was finished since the last call, if anything."""
        if not (self._moved or self._loaded):
            return None
        results = step.StepResults(
            rank=self.number,
            moved=tuple(self._moved),
            loads=tuple(self._loaded),
            disk_lost=self.disk_lost,
        )
        self.told_disk_lost = bool(self.disk_lost)
        self._moved, self._loaded = [], []
        return results

    # -- into slots ------------------------------------------------------------------------

    def save(self, command: step.Save) -> Iterator[float]:
        """Device → slots."""
        blocks = unpack_u32(command.blocks)
        names, slots = unpack(command.hashes), unpack_u32(command.slots)
        works = not self.world.copy_fails()

        def proven() -> list[bool]:
            contents = self.tiers[command.tier].contents
            right = all(contents[slot] == name for slot, name in zip(slots, names, strict=True))
            self.world.check(right, f"{self.name} saves other bytes than were computed")
            return [works] * len(blocks)

        yield from self._fill(
            command.tier, command.op, names, slots,
            lambda position: self.device[blocks[position]],
            proven,
            self._tell_leader,
        )  # fmt: skip

    def spill(self, command: step.Spill) -> Iterator[float]:
        """Host slots → disk slots."""
        yield from self._copy(
            command, Tier.HOST, command.host, Tier.DISK, command.disk, self._tell_leader
        )

    def fetch(self, command: step.Fetch, tell: Tell) -> None:
        """Disk slots → host slots, once, however often and by whatever way it is told."""
        if self._once.begin(command.op, tell, len(command.host) // 4):
            script = self._copy(
                command, Tier.DISK, command.disk, Tier.HOST, command.host, self._once.end
            )
            self._play(script, command.op)

    def _copy(
        self, command: step.Spill | step.Fetch, source: Tier, from_: bytes, target: Tier,
        to: bytes, tell: Tell,
    ) -> Iterator[float]:  # fmt: skip
        slots, names = unpack_u32(from_), unpack(command.hashes)
        expected = labels(names, unpack_u64(command.fills))
        broken = self.world.copy_fails()
        own = self.tiers[source]
        self._begin_reading(source, slots)
        yield from self._fill(
            target, command.op, names, unpack_u32(to),
            lambda position: own.contents[slots[position]],
            lambda: self._proven(source, slots, expected, broken),
            tell,
        )  # fmt: skip
        self._end_reading(source, slots)

    def fetch_remote(self, command: step.RemoteFetch) -> Iterator[float]:
        """Another node's host slots → own host slots."""
        pull = _Pull(self, command)
        yield from self._fill(
            Tier.HOST, command.op, unpack(command.hashes), unpack_u32(command.host),
            pull.read, pull.proven, self._tell_leader,
        )  # fmt: skip

    def _fill(
        self, tier: Tier, op: int, names: Sequence[BlockHash], slots: Sequence[int],
        read: Callable[[int], bytes], proven: Proof, tell: Tell,
    ) -> Iterator[float]:  # fmt: skip
        """Take the labels away, copy block by block, label what is right, and tell."""
        self.world.check(op >= self._first_fill, "a stamp of an earlier life is used again")
        yield self._pause(tier)
        self._begin_writing(tier, slots)
        self._maybe_nap()
        into = self.tiers[tier]
        for position, slot in enumerate(slots):
            yield self._pause(tier)
            into.write(slot, read(position))
        yield self._pause(tier)
        good = proven() if self._works(tier) else [False] * len(slots)
        self._writing.difference_update((tier, slot) for slot in slots)
        for name, slot, right in zip(names, slots, good, strict=True):
            if right:
                into.labels[slot] = Label(name, op)
        failed = [position for position, right in enumerate(good) if not right]
        tell(step.Moved(op=op, failed=pack_u32(failed), reason="broken" if failed else ""))

    def _tell_leader(self, moved: step.Moved) -> None:
        self._moved.append(moved)

    # -- lending device blocks ---------------------------------------------------------------

    def lend(self, command: step.Lend, tell: Tell) -> None:
        """Others may read device blocks; once, however often it is told."""
        if self._once.begin(command.op, tell, len(command.blocks) // 4):
            self._play(self._lend(command), command.op)

    def _lend(self, command: step.Lend) -> Iterator[float]:
        works = not self.world.copy_fails()
        blocks = unpack_u32(command.blocks)
        for name, block in zip(unpack(command.hashes), blocks, strict=True):
            yield self._pause(Tier.HOST)
            right = self.device[block] == name
            self.world.check(right, f"{self.name} lends other bytes than were computed")
            if works:
                self.lent[block] = Label(name, command.op)
        failed = b"" if works else pack_u32(range(len(blocks)))
        self._once.end(step.Moved(op=command.op, failed=failed))

    def unlend(self, command: step.Unlend) -> Iterator[float]:
        """Nobody may believe any more what is in these device blocks."""
        for block in unpack_u32(command.blocks):
            yield self._pause(Tier.HOST)
            self.lent.pop(block, None)
        self._tell_leader(step.Moved(op=command.op))

    def write_device(self, block: int, content: bytes) -> None:
        """The engine or a load fills a device block."""
        self.world.check(block not in self.lent, f"{self.name} overwrites a block that it lends")
        self.device[block] = content

    # -- into the device -------------------------------------------------------------------

    def load(self, command: step.Load) -> Iterator[float]:
        """Slots, own and others' → device; then say which device blocks cannot be believed."""
        failed: list[int] = []
        if command.local is not None:
            yield from self._copy_own(Tier.HOST, command.local, failed)
        if command.disk is not None:
            yield from self._copy_own(Tier.DISK, command.disk, failed)
        for read in command.remote:
            yield from self._pull(read, failed)
        self._loaded.append(
            step.LoadResult(op=command.op, request=command.request, failed_blocks=pack_u32(failed))
        )

    def _copy_own(self, tier: Tier, read: step.LocalRead, failed: list[int]) -> Iterator[float]:
        slots, blocks = unpack_u32(read.slots), unpack_u32(read.blocks)
        expected = labels(unpack(read.hashes), unpack_u64(read.fills))
        self._begin_reading(tier, slots)
        for slot, block in zip(slots, blocks, strict=True):
            self.write_device(block, TORN)
            yield self._pause(tier)
            self.write_device(block, self.tiers[tier].contents[slot])
        self._end_reading(tier, slots)
        good = self._proven(tier, slots, expected, self.world.copy_fails())
        failed.extend(block for block, right in zip(blocks, good, strict=True) if not right)

    def _pull(self, read: step.RemoteRead, failed: list[int]) -> Iterator[float]:
        pull, blocks = _Pull(self, read), unpack_u32(read.blocks)
        for position, block in enumerate(blocks):
            self.write_device(block, TORN)
            yield self._pause(Tier.HOST)
            self.write_device(block, pull.read(position))
        yield self._pause(Tier.HOST)
        good = pull.proven()
        failed.extend(block for block, right in zip(blocks, good, strict=True) if not right)

    # -- small things ----------------------------------------------------------------------

    def knows(self, agent: str) -> bool:
        """Whether it has met this agent."""
        return agent in self._known

    def proven(self, owner: Rank, tier: Tier, slot: int, label: Label) -> bool:
        """Whether a slot, own or another's, still holds what was to be read."""
        if tier is Tier.DEVICE:
            return owner.lent.get(slot) == label
        return owner.tiers[tier].holds(slot, label)

    def take_labels(self, tier: Tier, slots: Sequence[int]) -> None:
        """From here on nobody believes what is in these slots."""
        for slot in slots:
            self.tiers[tier].labels[slot] = None

    def _proven(
        self, tier: Tier, slots: Sequence[int], expected: list[Label], broken: bool
    ) -> list[bool]:
        works = self._works(tier) and not broken
        return [
            works and self.proven(self, tier, slot, label)
            for slot, label in zip(slots, expected, strict=True)
        ]

    def _works(self, tier: Tier) -> bool:
        return tier is Tier.HOST or not self.disk_lost

    def _begin_writing(self, tier: Tier, slots: Sequence[int]) -> None:
        places = {(tier, slot) for slot in slots}
        touched = any(self._reading[place] for place in places) or places & self._writing
        self.world.check(not touched, f"a slot in {tier} is rewritten while it is copied")
        self._writing |= places
        self.take_labels(tier, slots)
        for slot in slots:
            self.tiers[tier].write(slot, TORN)

    def _begin_reading(self, tier: Tier, slots: Sequence[int]) -> None:
        places = {(tier, slot) for slot in slots}
        self.world.check(
            not places & self._writing, f"a slot in {tier} is copied while it is rewritten"
        )
        self._reading.update(places)

    def _end_reading(self, tier: Tier, slots: Sequence[int]) -> None:
        self._reading.subtract({(tier, slot) for slot in slots})

    def _play(self, script: Iterator[float], op: int) -> None:
        def all_of_it() -> Iterator[float]:
            yield from script
            self._under_way.discard(op)
            self._maybe_rest()

        self._under_way.add(op)
        self.world.timeline.play(self.process, all_of_it())

    def _maybe_rest(self) -> None:
        """Say so when nothing older than the fence is under way."""
        if self._fence and not any(op <= self._fence for op in self._under_way):
            self._moved.append(step.Moved(op=self._fence))
            self._fence = 0

    def _maybe_nap(self) -> None:
        if self.world.chance.random() < self.world.weather.naps:
            self.world.stop(self.process)

    def _pause(self, tier: Tier) -> float:
        weather = self.world.weather
        slowness = weather.disk_slowness if tier is Tier.DISK else 1.0
        return self.world.chance.random() * weather.copy_seconds * slowness


class _Pull:
    """A read of another node's slots, which may vanish meanwhile."""

    def __init__(self, rank: Rank, read: step.RemoteRead | step.RemoteFetch) -> None:
        self._rank = rank
        self._agent = read.agents[rank.number]
        self._owner = rank.world.agents[self._agent]
        self._slots = unpack_u32(read.slots)
        self._expected = labels(unpack(read.hashes), unpack_u64(read.fills))
        self._ends = rank.world.timeline.now + read.seconds
        self._works = rank.knows(self._agent) and not rank.world.copy_fails()
        self._tier = read.tier if isinstance(read, step.RemoteRead) else Tier.HOST
        self._node = read.node
        self._places = [(read.node, self._tier, slot) for slot in self._slots]
        rank.pulling.update(self._places)
        rank.world.told[f"reads of {self._tier}"] += 1
        rank.world.oracles.reads_are_leased(rank.world.nodes[rank.node])

    def read(self, position: int) -> bytes:
        self._works = self._works and self._owner.process.alive
        if not self._works:
            return TORN
        slot = self._slots[position]
        if self._tier is Tier.DEVICE:
            return self._owner.device[slot]
        return self._owner.tiers[self._tier].contents[slot]

    def proven(self) -> list[bool]:
        """The read has ended: what of it can be believed."""
        self._rank.pulling.subtract(self._places)
        works = self._works and self._owner.process.alive
        works = works and self._rank.world.timeline.now <= self._ends
        return [
            works and self._rank.proven(self._owner, self._tier, slot, label)
            for slot, label in zip(self._slots, self._expected, strict=True)
        ]
