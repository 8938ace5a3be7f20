"""The offload filter: which blocks are wanted often enough to be worth a write to disk.

A block's frequency is 1 when it is first offered, doubles each time it is offered again, and
falls by 1 at each decay step until the block is forgotten. Blocks below the least frequency
stay off the disk, which spares the SSD what nobody asks for twice.

What was decided, and why:

- *Nothing happens at a decay step.* Kept of a block is its last step, the one at which its
  frequency is 1; the frequency follows by subtraction. So all of them fall by themselves.
- *What goes first has the lowest frequency, and of equals is about the oldest.* Blocks wait to
  be forgotten in one queue per last step. A hit leaves a block in the queue where it is; when
  its turn comes there, it moves on to the queue where it belongs. So each block waits once,
  never too late, and what does not move on is the least wanted of all.
- *Many small dictionaries, not a large one.* A dictionary of a million entries takes tens of
  milliseconds each time it grows, and the thread that asks is the engine's scheduler. The
  first byte of a block's name decides which one it is in: names are as good as random.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable

from kvbm_schemas.block import BlockHash

HIGHEST_FREQUENCY = 1024
"""Doubling ends here, so that what was wanted long ago is forgotten some day."""
MAX_ENTRIES = 10_000_000
"""The most blocks that one filter may remember."""

_SHARDS = 256
"""As many as the first byte of a name tells apart."""
_SHARD_ENTRIES = 4096
"""Where all blocks fit into fewer shards of so many, fewer do."""
_NEWCOMERS = 8
"""After so many new blocks in a shard, some of those that are due to be forgotten are,"""
_TURNS = 64
"""at most so many: more than have come, so that the shard shrinks."""
_MOST_TURNS = 128
"""Where a shard is full and so many have moved on, the next one is forgotten in any case."""
assert _NEWCOMERS < _TURNS < _MOST_TURNS


class OffloadFilter:
    """Accepts blocks of `min_frequency` or more; remembers at most `max_entries` blocks."""

    def __init__(
        self,
        min_frequency: int = 2,
        decay_seconds: float = 600.0,
        max_entries: int = 1_000_000,
    ) -> None:
        assert 1 <= min_frequency <= HIGHEST_FREQUENCY
        assert decay_seconds > 0
        assert 1 <= max_entries <= MAX_ENTRIES
        self._min_frequency = min_frequency
        self._decay_seconds = decay_seconds
        self._lasts = list(range(HIGHEST_FREQUENCY))
        """The last steps of blocks with frequency 1, 2, …: the present step, the next, …"""
        shards = min(-(-max_entries // _SHARD_ENTRIES), _SHARDS)
        self._shards = [_Shard(max_entries // shards) for _ in range(shards)]
        self._shard_of = [self._shards[byte % shards] for byte in range(256)]
        """By the first byte of a block's name."""

    def __len__(self) -> int:
        """How many blocks take up memory, forgotten ones that are not swept out yet included."""
        return sum(len(shard.last) for shard in self._shards)

    def offer(self, blocks: Iterable[BlockHash], now: float) -> list[bool]:
        """Count one hit of each block. Returns of each whether it should go to disk.

        Decay steps are at the multiples of `decay_seconds`; any number may have passed. A call
        takes time for its blocks only, about a microsecond each.
        """
        self._reach(int(now // self._decay_seconds))
        shard_of, lasts, least = self._shard_of, self._lasts, self._min_frequency
        return [shard_of[block[0]].hit(block, lasts) >= least for block in blocks]

    def frequency(self, block: BlockHash) -> int:
        """A block's frequency when something was last offered; 0 if it is forgotten."""
        last = self._shard_of[block[0]].last.get(block)
        return 0 if last is None else max(0, last - self._lasts[0] + 1)

    def _reach(self, step: int) -> None:
        if step > self._lasts[0]:
            self._lasts = list(range(step, step + HIGHEST_FREQUENCY))

    def check_integrity(self) -> None:
        """All blocks are where their names say, and all will be forgotten in time."""
        for shard in self._shards:
            shard.check_integrity()
            assert all(self._shard_of[block[0]] is shard for block in shard.last), "misplaced"


class _Shard:
    """The blocks of one dictionary, at most `limit`."""

    __slots__ = ("_limit", "_queues", "_steps", "last")

    def __init__(self, limit: int) -> None:
        assert limit > 0
        self.last: dict[BlockHash, int] = {}
        """The last step of each block."""
        self._limit = limit
        self._queues: dict[int, deque[BlockHash]] = {}
        """By step; none is empty."""
        self._steps: list[int] = []
        """The steps that have a queue, as a heap."""

    def hit(self, block: BlockHash, lasts: list[int]) -> int:
        """Count one hit. Returns the frequency after it."""
        step = lasts[0]
        last = self.last.get(block)
        if last is None:
            known = len(self.last)
            if known >= self._limit or known % _NEWCOMERS == 0:
                self._make_room(step)
            self._wait(block, step)
        elif last >= step:
            frequency = min(2 * (last - step + 1), HIGHEST_FREQUENCY)
            self.last[block] = lasts[frequency - 1]
            return frequency
        self.last[block] = step
        return 1

    def _make_room(self, step: int) -> None:
        """Take the turns that are due; where that is not enough, forget the least wanted block."""
        last, steps = self.last, self._steps
        for turn in range(_MOST_TURNS + 1):
            full = len(last) >= self._limit
            if not full and (turn >= _TURNS or not steps):
                return
            lowest = steps[0]
            queue = self._queues[lowest]
            block = queue[0]
            due = last[block]
            if due == lowest >= step and not full:
                return  # this one is still wanted, and so are all others
            queue.popleft()
            if not queue:
                del self._queues[heapq.heappop(steps)]
            if due == lowest or due < step or turn == _MOST_TURNS:
                del last[block]
            else:
                self._wait(block, due)

    def _wait(self, block: BlockHash, step: int) -> None:
        queue = self._queues.get(step)
        if queue is None:
            queue = self._queues[step] = deque()
            heapq.heappush(self._steps, step)
        queue.append(block)

    def check_integrity(self) -> None:
        """Every block waits once, and not behind its last step."""
        assert len(self.last) <= self._limit, "too many blocks"
        assert sorted(self._steps) == sorted(self._queues), "a queue is not in the heap"
        assert all(self._queues.values()), "a queue is empty"
        waiting = {block: step for step, queue in self._queues.items() for block in queue}
        assert sum(map(len, self._queues.values())) == len(waiting), "a block waits twice"
        assert waiting.keys() == self.last.keys(), "a block does not wait"
        assert all(step <= self.last[block] for block, step in waiting.items()), "waits too long"
