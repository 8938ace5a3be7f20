"""A simulated engine: it schedules, computes, loads and saves after vLLM's rules.

Each step: take what ranks have finished; admit waiting requests (which asks the leader what it
could load); give each running request a few blocks to compute; hand the commands to the ranks;
compute. Before computing, every block that a request builds on is looked at: that is the oracle
that matters most.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvbm_schemas import step
from kvbm_schemas.block import BlockHash
from kvbm_service.core.columns import unpack_u32
from kvbm_service.core.crew import State
from kvbm_service.core.reads import Origin
from tests.simulation.device_pool import DevicePool

if TYPE_CHECKING:
    from tests.simulation.node import Node
    from tests.simulation.rank import Rank
    from tests.simulation.world import World

BLOCKS_PER_STEP = 2
FORWARD_SECONDS = 0.01


class Stage(enum.Enum):
    """Where the engine has a request."""

    WAITING = enum.auto()
    LOADING = enum.auto()
    RUNNING = enum.auto()


@dataclass
class Request:
    """A prompt: its blocks' names, and which device blocks hold them."""

    name: str
    chain: list[BlockHash]
    stage: Stage = Stage.WAITING
    aborted: bool = False
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    offered: int = 0
    asked_since: float | None = None
    loading: int = 0
    ranks_loading: int = 0
    restarted: bool = False
    """Whether the load under way is of no use any more."""
    failed: set[int] = field(default_factory=set)
    decode_steps: int = 0
    origin: Origin | None = None
    """Who hands its blocks over."""
    prefill_only: bool = False
    """Whether it ends when its prompt is computed, and another engine goes on."""


class Engine:
    """One engine over the ranks of its node."""

    def __init__(self, world: World, node: Node) -> None:
        self.pool = DevicePool(world.weather.device_blocks)
        self.requests: dict[str, Request] = {}
        self._world = world
        self._node = node
        self._stepping = False
        self._failed_step: step.StepCommands | None = None
        """What was to be done around a forward pass that a rank did not survive."""
        self.was_reset = False

    def submit(self, request: Request) -> None:
        """A user asks."""
        self.requests[request.name] = request
        self._node.leader.arrive(
            request.name, request.chain, self._world.timeline.now, request.origin
        )
        self._node.pump()
        self.wake()

    def wake(self) -> None:
        """There may be something to do."""
        if self._broken:
            return
        if not self._stepping and (self.requests or self._node.leader.busy):
            self._stepping = True
            self._after(0.001, self._step)

    # -- when a rank is gone ---------------------------------------------------------------

    @property
    def _broken(self) -> bool:
        """Whether no forward pass is possible."""
        return not all(rank.process.alive and not rank.given_up for rank in self._node.ranks)

    def rank_replaced(self, rank: Rank) -> None:
        """A new process is there, whose device memory is empty: everything starts over."""
        self.pool.reset()
        for request in list(self.requests.values()):
            if request.stage is Stage.RUNNING:
                self._preempt(request)
            elif request.stage is Stage.LOADING:
                request.restarted = True
        if self._world.chance.random() < 0.5:
            self._repeat_failed_step(rank)  # which is not meant
        self.wake()

    def _fail_step(self, work: list[tuple[Request, int, int]], commands: step.StepCommands) -> None:
        """Those that are left may, or may not, have got as far as to their saves."""
        self._failed_step = commands
        there = [item for item in work if item[0].blocks]  # others were preempted meanwhile
        for rank in self._node.ranks:
            if rank.process.alive and self._world.chance.random() < 0.5:
                self._write(rank, there)
                rank.end_step(commands)

    def _repeat_failed_step(self, rank: Rank) -> None:
        """Channels have buffers: what was sent before may come after."""
        if self._failed_step is not None:
            rank.begin_step(self._failed_step)
            rank.end_step(self._failed_step)

    def _load_lost(self, lost: step.LoadResult) -> None:
        request = self.requests.get(lost.request)
        if request is None or request.stage is not Stage.LOADING:
            return
        self._world.check(request.restarted, f"{request.name}: a load was given up")
        request.restarted = False
        if request.aborted:
            self._forget(request)
        else:
            self._preempt(request)

    # -- one step --------------------------------------------------------------------------

    def _step(self) -> None:
        if self._broken:
            self._stepping = False
            return
        self._take_results()
        if self._node.leader.crew.whole:
            self._repeat_failed_step(self._world.chance.choice(self._node.ranks))
            self._failed_step = None
        self._interrupt_some()
        for request in list(self.requests.values()):
            if request.stage is Stage.RUNNING and request.computed == len(request.chain):
                if request.decode_steps == 0:
                    if request.prefill_only:
                        self._hand_over(request)
                    self._end(request)
                request.decode_steps -= 1
        self._admit()
        work = self._schedule()
        self._node.inspect()
        commands = self._node.take_commands()
        for rank in self._node.ranks:
            rank.begin_step(commands)
        self._after(FORWARD_SECONDS, lambda: self._compute(work, commands))

    def _take_results(self) -> None:
        leader, now = self._node.leader, self._world.timeline.now
        for rank in [*self._node.former, *self._node.ranks]:
            results = rank.take_results() if rank.process.alive else None
            if results is None:
                continue
            self._world.oracles.reported(self._node, results)
            settling = leader.crew.state is State.SETTLING
            leader.report(results, now)
            if settling and leader.crew.state is not State.SETTLING:
                self._world.oracles.salvaged_is_there(self._node)
            for loaded in results.loads:
                self._rank_loaded(loaded)
        for lost in leader.take_lost_loads():
            self._load_lost(lost)
        self.pool.release(leader.take_freed_blocks())

    def _rank_loaded(self, result: step.LoadResult) -> None:
        request = self.requests.get(result.request)
        if request is None or request.restarted or request.stage is not Stage.LOADING:
            return  # of before a rank was replaced
        request.failed.update(unpack_u32(result.failed_blocks))
        request.ranks_loading -= 1
        if request.ranks_loading:
            return
        if request.aborted:
            self._forget(request)
            return
        loaded = request.blocks[request.computed : request.computed + request.loading]
        for block in loaded:
            if block in request.failed:
                break
            self.pool.cache(request.chain[request.computed], block)
            request.computed += 1
        request.stage = Stage.RUNNING

    def _interrupt_some(self) -> None:
        weather, chance = self._world.weather, self._world.chance
        for request in list(self.requests.values()):
            if request.stage is Stage.RUNNING and chance.random() < weather.preemptions:
                self._preempt(request)
            elif not request.aborted and chance.random() < weather.aborts:
                self._end(request)
        if chance.random() < weather.resets:
            self.pool.reset()
            self._node.leader.reset()
            self.was_reset = True

    def _preempt(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks, request.computed, request.offered = [], 0, 0
        request.stage = Stage.WAITING

    def _end(self, request: Request) -> None:
        self._node.leader.finish(request.name)
        if request.stage is Stage.LOADING:
            request.aborted = True  # its blocks are still being written
        else:
            self._forget(request)

    def _hand_over(self, request: Request) -> None:
        """Keep the blocks for the engine that goes on."""
        token = self._world.new_token(self._node.name)
        on_device = request.blocks if self._world.chance.random() < 0.7 else []
        held = self._node.leader.hand_over(
            token, request.chain, on_device, self._world.timeline.now
        )
        if held is not None:
            self.pool.hold(held)
            origin = Origin(self._node.name, token, len(request.chain))
            self._world.handed_over(request, origin)
            self._node.pump()

    def _forget(self, request: Request) -> None:
        self.pool.release(request.blocks)
        del self.requests[request.name]

    # -- scheduling ------------------------------------------------------------------------

    def _admit(self) -> None:
        active = sum(request.stage is not Stage.WAITING for request in self.requests.values())
        for request in list(self.requests.values()):
            if request.stage is not Stage.WAITING:
                continue
            if active >= self._world.weather.running:
                return
            prefix = self.pool.cached_prefix(request.chain)
            found = self._match(request, len(prefix))
            if found is None:
                continue
            blocks = self.pool.take(prefix, len(request.chain) - len(prefix))
            if blocks is None:
                return
            self._start(request, blocks, len(prefix), found)
            active += 1

    def _match(self, request: Request, computed: int) -> int | None:
        now = self._world.timeline.now
        found = self._node.leader.match(request.name, computed, now)
        self._world.oracles.nothing_is_promised(self._node, found)
        if found is None:
            if request.asked_since is None:
                request.asked_since = now
            waited = now - request.asked_since
            self._world.check(
                waited < self._world.longest_wait,
                f"{request.name} has waited for {waited:.3f} s",
            )
        else:
            request.asked_since = None
        return found

    def _start(self, request: Request, blocks: list[int], computed: int, found: int) -> None:
        wanted = blocks[computed : computed + found]
        self._node.leader.load(request.name, computed, wanted, self._world.timeline.now)
        request.blocks, request.computed = blocks, computed
        request.decode_steps = self._world.chance.randint(0, 2)
        if found:
            request.stage, request.loading = Stage.LOADING, found
            request.ranks_loading, request.failed = len(self._node.ranks), set()
        else:
            request.stage = Stage.RUNNING

    def _schedule(self) -> list[tuple[Request, int, int]]:
        """Give each running request something to compute, and offer it for saving."""
        work = []
        for request in self.requests.values():
            if request.stage is not Stage.RUNNING:
                continue
            start = request.computed
            request.computed = end = min(start + BLOCKS_PER_STEP, len(request.chain))
            for index in range(start, end):
                self.pool.cache(request.chain[index], request.blocks[index])
            work.append((request, start, end))
            self._offer(request)
        return work

    def _offer(self, request: Request) -> None:
        offer = slice(request.offered, request.computed)
        dealt_with, held = self._node.leader.store(
            request.chain[offer], request.blocks[offer],
            request=request.name,
        )  # fmt: skip
        request.offered += dealt_with
        self.pool.hold(held)

    # -- the forward pass ------------------------------------------------------------------

    def _compute(self, work: list[tuple[Request, int, int]], commands: step.StepCommands) -> None:
        if commands.meant != self._node.leader.crew.meant or self._broken:
            self._fail_step(work, commands)
            self._stepping = False
            self.wake()
            return
        for rank in self._node.ranks:
            for request, start, _ in work:
                for index in range(start):
                    right = rank.device[request.blocks[index]] == request.chain[index]
                    self._world.check(right, f"{request.name} computes from wrong bytes")
            self._write(rank, work)
            rank.end_step(commands)
        self._stepping = False
        self.wake()

    def _write(self, rank: Rank, work: list[tuple[Request, int, int]]) -> None:
        for request, start, end in work:
            for index in range(start, end):
                rank.write_device(request.blocks[index], request.chain[index])

    def _after(self, delay: float, action: object) -> None:
        self._world.timeline.after(delay, self._node.process, action)  # type: ignore[arg-type]
