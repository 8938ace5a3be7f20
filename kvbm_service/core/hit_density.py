"""The default choice of what goes: the block that promises the fewest hits per second of a slot.

Prompts are chains of blocks, and requests share heads of chains. So what is known is kept for
segments: stretches of a chain that requests have so far only used together. They form a tree.
Its leaves go first, and the last block of a segment before the others: a chain loses its tail
before its head, and no block is kept whose head is gone.

A segment is of a kind: how often was it used, and how often has its conversation gone on where
the request before ended? Both numbers say that it is alive; so they are added, and there are
few kinds, of which much is soon known. What was used once is told apart by its length. What a
kind is worth at which age, `ReuseOdds` learns while requests come. Segments whose blocks are
all gone are remembered for a while: without them it could be learned only from those that were
used again in time.

Of each kind the segment that was used longest ago is looked at, and the worst of these goes.
So a use costs a look-up per segment, and a victim a look at a few kinds. What blocks cost by
themselves are copies and comparisons of lists, and look-ups in one table by slot.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from heapq import heapify, heappop, heappush, heapreplace
from itertools import chain

from kvbm_schemas.block import BlockHash
from kvbm_service.core.reuse_odds import NOBODY, Cohort, ReuseOdds

GHOSTS = 16_384
"""Segments without blocks in slots that are remembered; those used longest ago are forgotten."""

AWAITED_SEGMENTS = 4096
"""Segments of which blocks may come to be stored whose neighbours are not."""

AWAITED_BLOCKS = 65_536
"""So many blocks of these are looked up at least, twice as many at most."""

LEARN_REQUESTS = 32
"""Conclusions are drawn every so many requests."""

LAST = 0
"""The kind of a block at the end of the first request that had it: often it is not full yet,
and has another name in the next request."""

SIZES = 6
"""The kinds of what was used once, by blocks: 1, 2–3, 4–7, 8–15, 16–31, more."""

LIVES = 7
"""The kinds of the rest, by uses and turns, added up: 2–3, 4–7, 8–15 … 64–127, more."""

FAMILIES = (1, SIZES, LIVES)

GONE = -1
"""Stands for the slot of a block that is in none."""


class _Segment:
    """Blocks of a chain that requests have so far only used together."""

    __slots__ = (
        "blocks", "cohort", "kids", "kind", "may_go", "parent", "queued", "reach", "slots",
        "stored", "turn", "uses",
    )  # fmt: skip

    def __init__(self, blocks: list[BlockHash]) -> None:
        self.blocks = blocks
        self.slots = [GONE] * len(blocks)
        self.stored = 0
        """How many of its blocks are in slots."""
        self.may_go = len(blocks)
        """None of its blocks from this one on may go."""
        self.parent: _Segment | None = None
        self.kids = 0
        """How many of the segments right behind it are alive."""
        self.queued = False
        self.kind = LAST
        self.uses = 0
        self.turn = 0
        self.reach = 0
        """The length of the last request that used it."""
        self.cohort: Cohort = NOBODY
        """With what it was used last; NOBODY: it is forgotten."""

    @property
    def alive(self) -> bool:
        """Whether what it follows must stay."""
        return self.stored > 0 or self.kids > 0


class HitDensity:
    """Eviction by the hits to be expected per second, with odds that are learned on the way."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: how many slots there are."""
        self._odds = ReuseOdds(FAMILIES)
        self._tree: dict[BlockHash, _Segment] = {}
        """By first block; names are chained, so that one says where in the tree it is."""
        self._ghosts: OrderedDict[_Segment, None] = OrderedDict()
        """Those of the tree that are not alive, the one to forget first."""
        self._segments: list[_Segment | None] = [None] * capacity
        """Of each slot, but for those of found blocks."""
        self._stored = 0
        """How many slots have a segment."""
        self._hidden: set[int] = set()
        self._queues: list[OrderedDict[_Segment, None]] = [
            OrderedDict() for _ in range(sum(FAMILIES))
        ]
        """Of each kind what may go, the segment used longest ago first."""
        self._blocked: OrderedDict[_Segment, None] = OrderedDict()
        """Segments that came up for eviction while others follow them."""
        self._worst: list[tuple[float, int]] = []
        """A heap of (density of the first in its queue, kind)."""
        self._sorted = False
        self._awaiting: deque[_Segment] = deque(maxlen=AWAITED_SEGMENTS)
        """Lately used segments whose blocks are not in `_awaited` yet."""
        self._awaited: dict[BlockHash, _Segment] = {}
        self._awaited_longer: dict[BlockHash, _Segment] = {}
        self._found: dict[BlockHash, int] = {}
        """Adopted blocks that no request has used yet, and their slots."""
        self._found_order: deque[BlockHash] = deque()
        """Those that go first, first; also some that are not there any more."""
        self._now = 0.0
        self._requests = 0

    # -- uses ------------------------------------------------------------------------

    def use(self, chain: Sequence[BlockHash], now: float) -> None:
        """Its segments were used; what the chain has beyond them becomes new ones."""
        self._now = max(now, self._now)
        self._requests += 1
        self._sorted = False
        self._odds.grow_older(self._now)
        path, known = self._walk(chain)
        turn = path[-1].turn + 1 if path and known >= path[-1].reach - 1 else 0
        last = max(known, len(chain) - 1)
        new = (chain[known:last], chain[last:])
        path.extend(self._grow(list(blocks)) for blocks in new if blocks)
        before: _Segment | None = None
        for segment in path:
            self._attach(segment, before)
            segment.uses += 1
            segment.turn, segment.reach = turn, len(chain)
            is_last = segment is path[-1] and known < len(chain)
            self._refresh(
                segment, LAST if is_last else _kind(segment.uses, turn, len(segment.blocks))
            )
            before = segment
        self._forget()
        if self._requests % LEARN_REQUESTS == 0:
            self._odds.learn()

    def _walk(self, chain: Sequence[BlockHash]) -> tuple[list[_Segment], int]:
        """The segments of the chain's known head, and the head's length.

        One of which the chain has only a part is split. Names are chained, so that all of a
        segment is there if its last block is.
        """
        path: dict[_Segment, None] = {}
        known = 0
        while known < len(chain):
            segment = self._tree.get(chain[known])
            if segment is None or segment in path:
                break
            end = known + len(segment.blocks)
            if end > len(chain) or chain[end - 1] != segment.blocks[-1]:
                segment = self._split(segment, _same(segment.blocks, chain[known:end]))
            path[segment] = None
            known += len(segment.blocks)
        return list(path), known

    def _split(self, tail: _Segment, count: int) -> _Segment:
        """Make the first `count` blocks of a segment one of their own, which the rest follows."""
        head = _Segment(tail.blocks[:count])
        head.slots = tail.slots[:count]
        stored = [slot for slot in head.slots if slot != GONE]
        for slot in stored:
            self._segments[slot] = head
        head.stored = len(stored)
        head.kind, head.uses, head.turn, head.reach = tail.kind, tail.uses, tail.turn, tail.reach
        head.cohort = tail.cohort
        self._odds.split(head.cohort)
        del tail.blocks[:count], tail.slots[:count]
        tail.stored -= head.stored
        tail.may_go = len(tail.blocks)
        self._tree[head.blocks[0]], self._tree[tail.blocks[0]] = head, tail
        head.parent, tail.parent = tail.parent, head
        head.kids = int(tail.alive)
        if not tail.alive:
            self._ghosts[tail] = None
        if not head.alive:
            self._ghosts[head] = None
        return head

    def _grow(self, blocks: list[BlockHash]) -> _Segment:
        """A new segment, in which those of its blocks that were found have slots."""
        segment = _Segment(blocks)
        self._tree[blocks[0]] = segment
        self._ghosts[segment] = None
        if self._found:
            for index, block in enumerate(blocks):
                if (slot := self._found.pop(block, None)) is not None:
                    self._put(segment, index, [slot])
        return segment

    def _attach(self, segment: _Segment, parent: _Segment | None) -> None:
        """Let it follow `parent`: one that was forgotten meanwhile may be another one now."""
        if segment.parent is not parent:
            if segment.alive and segment.parent is not None:
                self._lose_kid(segment.parent)
            segment.parent = parent
            if segment.alive and parent is not None:
                self._win_kid(parent)

    def _refresh(self, segment: _Segment, kind: int) -> None:
        """It was used just now; it is of this kind from now on."""
        if segment.queued:
            del self._queues[segment.kind][segment]
        else:
            self._blocked.pop(segment, None)
        if segment.cohort is not NOBODY:
            self._odds.used(segment.cohort, segment.kind, len(segment.blocks))
        segment.kind = kind
        segment.queued = True
        segment.cohort = self._odds.join(kind, len(segment.blocks))
        self._queues[kind][segment] = None
        if segment in self._ghosts:
            self._ghosts.move_to_end(segment)
        if segment.stored < len(segment.blocks):
            self._awaiting.append(segment)

    def _forget(self) -> None:
        """Keep to the limit."""
        while len(self._ghosts) > GHOSTS:
            segment, _ = self._ghosts.popitem(last=False)
            if segment.cohort is not NOBODY:
                self._odds.leave(segment.cohort, segment.kind, len(segment.blocks))
                segment.cohort = NOBODY
            if self._tree.get(segment.blocks[0]) is segment:
                del self._tree[segment.blocks[0]]
            if segment.queued:
                segment.queued = False
                del self._queues[segment.kind][segment]

    # -- slots -----------------------------------------------------------------------

    def add(self, blocks: Sequence[BlockHash], slots: Sequence[int], after: int | None) -> None:
        """They are stored in the segments of the request that had them."""
        self._hidden.update(slots)
        segment = None if after is None else self._segments[after]
        index = 0 if segment is None or after is None else _place(segment, after) + 1
        done = 0
        while done < len(blocks):
            if segment is None or segment.blocks[index : index + 1] != [blocks[done]]:
                gap = segment is None or done > 0
                segment, index = self._home(blocks[done], segment, index, gap)
            end = done + len(segment.blocks) - index
            same = _same(segment.blocks[index:], blocks[done:end])
            self._put(segment, index, slots[done : done + same])
            done += same
            index += same

    def _home(
        self, block: BlockHash, before: _Segment | None, index: int, gap: bool
    ) -> tuple[_Segment, int]:
        """Where to store a block that is not the one at `index` of the segment `before`.

        With a `gap` there may be other blocks of its request between the two.
        """
        segment = self._tree.get(block)
        if segment is not None:
            return segment, 0
        segment = self._expecting(block) if gap else None
        if segment is not None:
            return segment, segment.blocks.index(block)
        return self._unasked(block, before, index)

    def _expecting(self, block: BlockHash) -> _Segment | None:
        """The segment of a request that had this block, if it still is that block's."""
        while self._awaiting:
            segment = self._awaiting.popleft()
            if segment.stored < len(segment.blocks):
                self._awaited.update(dict.fromkeys(segment.blocks, segment))
            if len(self._awaited) > AWAITED_BLOCKS:
                self._awaited, self._awaited_longer = {}, self._awaited
        found = self._awaited.get(block) or self._awaited_longer.get(block)
        if found is None or found.cohort is NOBODY or block not in found.blocks:
            return None
        return found

    def _unasked(
        self, block: BlockHash, before: _Segment | None, index: int
    ) -> tuple[_Segment, int]:
        """Where to store a block that no request had yet: the engine has just made it."""
        if before is not None and before.uses == 0 and index == len(before.blocks):
            before.blocks.append(block)
            before.slots.append(GONE)
            self._odds.extend(before.cohort, before.kind, 1)
            return before, index
        segment = _Segment([block])
        self._tree[block] = segment
        self._ghosts[segment] = None
        self._attach(segment, before)
        self._refresh(segment, _kind(1, before.turn if before else 0, 1))
        return segment, 0

    def _put(self, segment: _Segment, index: int, slots: Sequence[int]) -> None:
        if not segment.alive:
            self._live(segment)
        segment.slots[index : index + len(slots)] = slots
        segment.stored += len(slots)
        self._stored += len(slots)
        segments = self._segments
        for slot in slots:
            segments[slot] = segment

    def adopt(self, blocks: Sequence[BlockHash], slots: Sequence[int]) -> None:
        """Until they are used they go first, and the oldest of them before the others."""
        self._found.update(zip(blocks, slots, strict=True))
        self._found_order.extend(blocks)

    def show(self, slots: Sequence[int]) -> None:
        """A segment that was taken out of its queue, since all in it was hidden, is put back."""
        self._hidden.difference_update(slots)
        for segment in dict.fromkeys(map(self._segments.__getitem__, slots)):
            if segment is not None:
                segment.may_go = len(segment.blocks)
                if not segment.queued and segment not in self._blocked:
                    self._enqueue_first(segment)

    def hide(self, slots: Sequence[int]) -> None:
        """Their segments stay where they are until they come up for eviction."""
        self._hidden.update(slots)

    def drop(self, block: BlockHash, slot: int) -> None:
        """What its segment follows may become a leaf."""
        self._hidden.discard(slot)
        segment = self._segments[slot]
        if segment is None:
            del self._found[block]
        else:
            self._take_out(segment, _place(segment, slot), 1)

    def _take_out(self, segment: _Segment, index: int, count: int) -> list[int]:
        """Returns the slots that these stored blocks had."""
        slots = segment.slots[index : index + count]
        segments = self._segments
        for slot in slots:
            segments[slot] = None
        segment.slots[index : index + count] = [GONE] * count
        segment.stored -= count
        self._stored -= count
        if not segment.alive:
            self._die(segment)
        return slots

    def _live(self, segment: _Segment) -> None:
        self._ghosts.pop(segment, None)
        if segment.parent is not None:
            self._win_kid(segment.parent)

    def _die(self, segment: _Segment) -> None:
        self._ghosts[segment] = None
        if segment.parent is not None:
            self._lose_kid(segment.parent)

    def _win_kid(self, segment: _Segment) -> None:
        if not segment.alive:
            self._live(segment)
        segment.kids += 1

    def _lose_kid(self, segment: _Segment) -> None:
        segment.kids -= 1
        if segment.kids == 0 and self._blocked.pop(segment, GONE) is None:
            self._enqueue_first(segment)
        if not segment.alive:
            self._die(segment)

    # -- victims ---------------------------------------------------------------------

    def victims(self, wanted: int, spared: AbstractSet[int]) -> list[int]:
        """What was found and not used; then the last block of the leaf that is worth least."""
        victims: list[int] = []
        for _ in range(len(self._found_order)):
            if len(victims) == wanted:
                return victims
            block = self._found_order.popleft()
            slot = self._found.get(block, GONE)
            if slot in self._hidden or slot in spared:
                self._found_order.append(block)  # so that the next search does not meet it
            elif slot != GONE:
                del self._found[block]
                victims.append(slot)
        aside: list[_Segment] = []
        while len(victims) < wanted and len(self._hidden) < self._stored:
            leaf = self._worst_leaf(spared, aside)
            if leaf is None:
                break
            victims += self._cut(leaf, wanted - len(victims), spared)
        for segment in aside:
            self._enqueue_first(segment)
        if len(victims) < wanted:
            self._take_any(wanted, spared, victims)
        return victims

    def _cut(self, leaf: _Segment, wanted: int, spared: AbstractSet[int]) -> list[int]:
        """Take up to `wanted` blocks off its end, at once if nothing is in between."""
        victims: list[int] = []
        while len(victims) < wanted:
            last = self._last_shown(leaf)
            if last == GONE or last in spared:
                break
            begin = max(0, leaf.may_go - wanted + len(victims))
            slots = leaf.slots[begin : leaf.may_go]
            whole = GONE not in slots and spared.isdisjoint(slots)
            if not whole or not self._hidden.isdisjoint(slots):
                begin = leaf.may_go - 1
            taken = self._take_out(leaf, begin, leaf.may_go - begin)
            leaf.may_go = begin
            victims.extend(reversed(taken))
        return victims

    def _worst_leaf(self, spared: AbstractSet[int], aside: list[_Segment]) -> _Segment | None:
        """The leaf whose last block is to go; those that would be, but are spared, go `aside`."""
        if not self._sorted:
            self._sort()
        while self._worst:
            density, kind = self._worst[0]
            queue = self._queues[kind]
            if not queue:
                heappop(self._worst)
                continue
            segment = next(iter(queue))
            present = self._density(segment)
            if present > density:
                heapreplace(self._worst, (present, kind))
                continue
            slot = self._last_shown(segment)
            if slot != GONE and segment.kids == 0 and slot not in spared:
                return segment
            del queue[segment]
            segment.queued = False
            if segment.kids:
                self._blocked[segment] = None
            elif slot != GONE:
                aside.append(segment)
        return None

    def _sort(self) -> None:
        self._sorted = True
        densities = self._odds.densities
        self._worst = [
            (densities[first.kind][first.cohort.span], first.kind)
            for first in map(next, map(iter, filter(None, self._queues)))
        ]
        heapify(self._worst)

    def _density(self, segment: _Segment) -> float:
        return self._odds.densities[segment.kind][segment.cohort.span]

    def _last_shown(self, segment: _Segment) -> int:
        """The slot of its last block that may go, or GONE."""
        while segment.may_go:
            slot = segment.slots[segment.may_go - 1]
            if slot != GONE and slot not in self._hidden:
                return slot
            segment.may_go -= 1
        return GONE

    def _take_any(self, wanted: int, spared: AbstractSet[int], victims: list[int]) -> None:
        """No leaf may go: take what may, of what others follow or is spared in part."""
        waiting = chain(self._blocked, *self._queues)
        may_go = [
            (segment, index)
            for segment in waiting
            for index in range(len(segment.slots) - 1, -1, -1)
            if segment.slots[index] not in self._hidden
            and segment.slots[index] not in spared
            and segment.slots[index] != GONE
        ]
        for segment, index in may_go[: wanted - len(victims)]:
            victims.append(segment.slots[index])
            self._take_out(segment, index, 1)

    def _enqueue_first(self, segment: _Segment) -> None:
        queue = self._queues[segment.kind]
        queue[segment] = None
        queue.move_to_end(segment, last=False)
        segment.queued = True
        if self._sorted:
            heappush(self._worst, (self._density(segment), segment.kind))

    def check_integrity(self, shown: AbstractSet[int], hidden: AbstractSet[int]) -> None:
        """All tables agree, and the slots in them are these."""
        stored = {slot: one for slot, one in enumerate(self._segments) if one is not None}
        known = {*stored, *self._found.values()}
        assert self._found.keys() <= set(self._found_order), "what was found would never go"
        assert known == shown | hidden, "other slots are known than are in use"
        assert len(known) == len(stored) + len(self._found), "a slot is known twice"
        assert self._stored == len(stored), "the count of stored blocks is wrong"
        assert self._hidden == hidden, "other slots are hidden"
        kids: Counter[_Segment] = Counter()
        segments: set[_Segment] = set()
        for segment in (*stored.values(), *self._tree.values()):
            above: _Segment | None = segment
            while above is not None and above not in segments:
                segments.add(above)
                above = above.parent
        for segment in segments:
            _check(segment, stored, hidden)
            assert segment.queued == (segment in self._queues[segment.kind]), "lost in a queue"
            waits = segment.queued or segment in self._blocked
            assert waits or not set(segment.slots) & shown, "what may go waits nowhere"
            ghost = segment in self._ghosts or segment.cohort is NOBODY
            assert segment.alive or ghost, "neither alive nor a ghost"
            if segment.alive and segment.parent is not None:
                kids[segment.parent] += 1
        for segment in segments:
            assert segment.kids == kids[segment], "the count of kids is wrong"
        assert not any(segment.alive for segment in self._ghosts), "a ghost is alive"
        remembered = segments | self._ghosts.keys()
        self._odds.check_integrity(Counter(s.cohort for s in remembered if s.cohort is not NOBODY))


def _check(segment: _Segment, segments: Mapping[int, _Segment], hidden: AbstractSet[int]) -> None:
    stored = [slot for slot in segment.slots if slot != GONE]
    assert len(segment.slots) == len(segment.blocks), "not a place for each block"
    assert segment.stored == len(stored), "the count of stored blocks is wrong"
    assert all(segments[slot] is segment for slot in stored), "a slot is another segment's"
    assert {*segment.slots[segment.may_go :]} <= {*hidden, GONE}, "what may go is not looked at"


def _same(some: Sequence[BlockHash], others: Sequence[BlockHash]) -> int:
    """How many blocks both have in common from their beginnings on."""
    count = min(len(some), len(others))
    if some[:count] == others[:count]:
        return count
    pairs = enumerate(zip(some, others, strict=False))
    return next((index for index, (one, other) in pairs if one != other), count)


def _place(segment: _Segment, slot: int) -> int:
    """Where in the segment's slots this one is; often it is the last."""
    last = len(segment.slots) - 1
    return last if segment.slots[last] == slot else segment.slots.index(slot)


def _kind(uses: int, turn: int, blocks: int) -> int:
    life = (uses + turn).bit_length() - 1
    if life == 0:
        return LAST + min(blocks.bit_length(), SIZES)
    return LAST + SIZES + min(life, LIVES)
