"""A simulated rank: device blocks, a slab of slots with headers, and copies that take time.

A block's bytes are its name; a place that is being written, or never was, holds `TORN`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvbm_schemas import step
from kvbm_schemas.block import unpack
from kvbm_schemas.records import RankRecord, SlabRecord
from kvbm_service.core.columns import pack_u32, unpack_u32, unpack_u64
from tests.simulation.timeline import Process

if TYPE_CHECKING:
    from tests.simulation.world import World

TORN = b""
Header = tuple[bytes, int]


class Rank:
    """One rank's memory, and what it does on command."""

    def __init__(self, world: World, node: str, number: int, process: Process) -> None:
        weather = world.weather
        self.world = world
        self.number = number
        self.process = process
        self.agent = world.new_agent(self, f"{node}/{number}")
        self.device = [TORN] * weather.device_blocks
        self.slots = [TORN] * weather.host_slots
        self.headers: list[Header | None] = [None] * weather.host_slots
        self.touched: Counter[int] = Counter()
        """Own copies under way, by slot."""
        self._node = node
        self._known: set[str] = set()
        self._saved: list[int] = []
        self._save_failed: list[int] = []
        self._loaded: list[step.LoadResult] = []

    def record(self) -> RankRecord:
        """What the directory says about this rank."""
        slab = SlabRecord(base=0, headers=0, slots=len(self.slots), slot_bytes=1, header_bytes=1)
        return RankRecord(
            node=self._node,
            rank=self.number,
            world_size=self.world.weather.world_size,
            agent=self.agent,
            agent_metadata=b"",
            slab=slab,
        )

    def begin_step(self, commands: step.StepCommands) -> None:
        """Meet and forget peers, and start loading; saves have to wait for the forward pass."""
        self._known.difference_update(commands.gone)
        self._known.update(record.agent for record in commands.peers)
        if commands.loads:
            self._maybe_nap()
        for load in commands.loads:
            self.world.timeline.play(self.process, self.load(load))

    def end_step(self, commands: step.StepCommands) -> None:
        """The forward pass is over: start saving."""
        for save in commands.saves:
            self.world.timeline.play(self.process, self.save(save))

    def take_results(self) -> step.StepResults:
        """What was finished since the last call."""
        results = step.StepResults(
            rank=self.number,
            saved=tuple(self._saved),
            save_failed=tuple(self._save_failed),
            loads=tuple(self._loaded),
        )
        self._saved, self._save_failed, self._loaded = [], [], []
        return results

    # -- copies ----------------------------------------------------------------------------

    def save(self, command: step.Save) -> Iterator[float]:
        """Device → slots: clear the headers, copy, then set the headers."""
        hashes, slots = unpack(command.hashes), unpack_u32(command.slots)
        yield self._pause()
        for slot in slots:
            self.world.check(not self.touched[slot], "a slot is rewritten while it is copied")
            self.touched[slot] += 1
            self.slots[slot] = TORN
        self.clear_headers(list(slots))
        self._maybe_nap()
        broken = self.world.copy_fails()
        for block, slot in zip(unpack_u32(command.blocks), slots, strict=True):
            yield self._pause()
            if not broken:
                self.slots[slot] = self.device[block]
        yield self._pause()
        self.touched.subtract(slots)
        if broken:
            self._save_failed.append(command.op)
            return
        for name, slot in zip(hashes, slots, strict=True):
            self.headers[slot] = (name, command.op)
        self._saved.append(command.op)

    def load(self, command: step.Load) -> Iterator[float]:
        """Slots, own and others' → device; then say which device blocks cannot be believed."""
        failed: list[int] = []
        if command.local is not None:
            yield from self._copy_own(command.local, failed)
        for read in command.remote:
            yield from self._pull(read, failed)
        self._loaded.append(
            step.LoadResult(
                op=command.op, request=command.request, failed_blocks=pack_u32(failed)
            )
        )

    def _copy_own(self, read: step.LocalRead, failed: list[int]) -> Iterator[float]:
        slots, blocks = unpack_u32(read.slots), unpack_u32(read.blocks)
        self.touched.update(slots)
        for slot, block in zip(slots, blocks, strict=True):
            self.device[block] = TORN
            yield self._pause()
            self.device[block] = self.slots[slot]
        self.touched.subtract(slots)
        broken = self.world.copy_fails()
        for block, right in zip(blocks, self.believed(self, read), strict=True):
            if broken or not right:
                failed.append(block)

    def _pull(self, read: step.RemoteRead, failed: list[int]) -> Iterator[float]:
        ends = self.world.timeline.now + read.seconds
        blocks = unpack_u32(read.blocks)
        agent = read.agents[self.number]
        owner = self.world.agents[agent]
        reachable = agent in self._known and not self.world.copy_fails()
        for slot, block in zip(unpack_u32(read.slots), blocks, strict=True):
            self.device[block] = TORN
            yield self._pause()
            reachable = reachable and owner.process.alive
            if reachable:
                self.device[block] = owner.slots[slot]
        yield self._pause()
        reachable = reachable and owner.process.alive and self.world.timeline.now <= ends
        for block, right in zip(blocks, self.believed(owner, read), strict=True):
            if not (reachable and right):
                failed.append(block)

    def clear_headers(self, slots: list[int]) -> None:
        """From here on nobody believes what is in these slots."""
        for slot in slots:
            self.headers[slot] = None

    def believed(self, owner: Rank, read: step.LocalRead | step.RemoteRead) -> list[bool]:
        """Whether each slot still holds what was to be read."""
        expected = zip(unpack(read.hashes), unpack_u64(read.fills), strict=True)
        return [
            owner.headers[slot] == header
            for slot, header in zip(unpack_u32(read.slots), expected, strict=True)
        ]

    def _maybe_nap(self) -> None:
        if self.world.chance.random() < self.world.weather.naps:
            self.world.stop(self.process)

    def _pause(self) -> float:
        return self.world.chance.random() * self.world.weather.copy_seconds
