"""The registry's view of the cluster: which member holds which blocks.

Inputs are what the directory, the nodes and the clock say; effects are snapshots to ask
for; questions are answered from memory. Only members count: whatever comes from a node that
the directory does not list changes nothing. What is known of a member is always a state
that it really was in, at its cursor's position (cursor.py), in the life that the directory lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kvbm_schemas.block import HASH_BYTES
from kvbm_schemas.events import BlockEvent, Cleared, Removed, Stored
from kvbm_schemas.requests import Holder, Segment, SnapshotChunk
from kvbm_schemas.subjects import Scope
from kvbm_service.core.block_index import MAX_BLOCKS_PER_NODE, BlockIndex
from kvbm_service.core.cursor import Apply, Ask, Cursor, Forget, Position, Replace, State, Steps
from kvbm_service.core.registry_counts import RegistryCounts

MAX_SCOPES = 256
MAX_NODES_PER_SCOPE = 2_048
"""Half the numbers that an index has, so that a dropped node need not be swept out at once."""


class AskSnapshot(NamedTuple):
    """Ask this node for a snapshot of its blocks."""

    scope: Scope
    node: str


Effects = tuple[AskSnapshot, ...]


class Limits(NamedTuple):
    """How much a registry takes in; what is beyond is ignored and counted."""

    scopes: int = MAX_SCOPES
    nodes_per_scope: int = MAX_NODES_PER_SCOPE
    blocks_per_node: int = MAX_BLOCKS_PER_NODE


DEFAULT_LIMITS = Limits()


class NodeView(NamedTuple):
    """What is known of one member."""

    scope: Scope
    node: str
    at: Position
    state: State
    copies: int


class _Node:
    """A member: its cursor, and its number in the scope's index."""

    def __init__(self, number: int, cursor: Cursor) -> None:
        self.number = number
        self.cursor = cursor


class _View:
    """One scope: its members and their blocks."""

    def __init__(self, seed: int, blocks_per_node: int) -> None:
        self.index = BlockIndex(seed, blocks_per_node)
        self.nodes: dict[str, _Node] = {}
        self.names: dict[int, str] = {}

    def add(self, name: str, cursor: Cursor) -> None:
        number = self.index.add_node()
        assert number is not None, "an index has numbers for twice as many nodes as a scope"
        self.nodes[name] = _Node(number, cursor)
        self.names[number] = name

    def drop(self, name: str) -> None:
        number = self.nodes.pop(name).number
        del self.names[number]
        self.index.drop_node(number)

    def empty(self, name: str) -> None:
        """Take all blocks from a member."""
        node = self.nodes[name]
        if self.index.copies(node.number):
            self.drop(name)
            self.add(name, node.cursor)


class Registry:
    """Who holds which block, per scope. Not safe for use from two threads at once."""

    def __init__(self, seed: int, limits: Limits = DEFAULT_LIMITS) -> None:
        """`seed` should be a secret of the process (see block_index.py)."""
        assert 0 < limits.nodes_per_scope <= MAX_NODES_PER_SCOPE
        self.counts = RegistryCounts()
        self._seed = seed
        self._limits = limits
        self._views: dict[Scope, _View] = {}

    # Inputs

    def joined(self, scope: Scope, node: str, epoch: int, now: float) -> Effects:
        """The directory lists `node`, in its life `epoch`; also when it already did."""
        view = self._views.get(scope)
        if view is None:
            if len(self._views) == self._limits.scopes:
                self.counts.refused_scopes += 1
                return ()
            view = self._views[scope] = _View(self._seed, self._limits.blocks_per_node)
        member = view.nodes.get(node)
        if member is None:
            if len(view.nodes) == self._limits.nodes_per_scope:
                self.counts.refused_nodes += 1
                return ()
            view.add(node, Cursor(self.counts, self._limits.blocks_per_node))
            member = view.nodes[node]
        return _perform(view, scope, node, member.cursor.started(epoch, now))

    def left(self, scope: Scope, node: str, now: float) -> Effects:
        """The directory no longer lists `node`."""
        view = self._views.get(scope)
        if view is not None and node in view.nodes:
            view.drop(node)
            if not view.nodes:
                del self._views[scope]
        return ()

    def event(self, scope: Scope, node: str, event: BlockEvent, now: float) -> Effects:
        """`node` has published `event`."""
        view = self._views.get(scope)
        member = view and view.nodes.get(node)
        if not view or not member:
            self.counts.unknown_sender += 1
            return ()
        return _perform(view, scope, node, member.cursor.event(event, now))

    def chunk(self, scope: Scope, node: str, chunk: SnapshotChunk, now: float) -> Effects:
        """`node` has sent a part of a snapshot."""
        view = self._views.get(scope)
        member = view and view.nodes.get(node)
        if not view or not member:
            self.counts.unknown_sender += 1
            return ()
        return _perform(view, scope, node, member.cursor.chunk(chunk, now))

    def tick(self, now: float) -> Effects:
        """Time has passed: ask again where an answer is overdue."""
        asks: list[AskSnapshot] = []
        for scope, view in self._views.items():
            for node, member in view.nodes.items():
                asks += _perform(view, scope, node, member.cursor.tick(now))
        return tuple(asks)

    # Questions

    def lookup(self, scope: Scope, packed: bytes, asker: str = "") -> tuple[Segment, ...]:
        """The chain's longest known prefix, covered greedily by members other than `asker`.

        At each position the holder with the longest run from there is taken; of equals one in
        host memory before disk before device. Segments follow each other from index 0.
        """
        self.counts.lookups += 1
        view = self._views.get(scope)
        if view is None:
            return ()
        member = view.nodes.get(asker)
        runs = view.index.lookup(packed, None if member is None else member.number)
        names = view.names
        return tuple(
            Segment(node=names[node], tier=tier, start=start, count=blocks)
            for node, tier, start, blocks in runs
        )

    def locate(self, scope: Scope, packed: bytes) -> tuple[tuple[Holder, ...], ...]:
        """All holders of each block, in the order asked."""
        self.counts.locates += 1
        view = self._views.get(scope)
        if view is None:
            return ((),) * (len(packed) // HASH_BYTES)
        names = view.names
        return tuple(
            tuple(Holder(node=names[node], tier=tier) for node, tier in holders)
            for holders in view.index.locate(packed)
        )

    def nodes(self) -> Iterator[NodeView]:
        """All members."""
        for scope, view in self._views.items():
            for node, member in view.nodes.items():
                cursor = member.cursor
                copies = view.index.copies(member.number)
                yield NodeView(scope, node, cursor.at, cursor.state, copies)

    @property
    def scopes(self) -> int:
        """Scopes that have members."""
        return len(self._views)

    @property
    def blocks(self) -> int:
        """Different blocks known, those being swept out included."""
        return sum(len(view.index) for view in self._views.values())

    @property
    def copies(self) -> int:
        """Copies of blocks known, in all tiers of all members."""
        return sum(view.index.all_copies for view in self._views.values())

    @property
    def refused_blocks(self) -> int:
        """Copies ignored because their node had as many as it may, in the scopes there are."""
        return sum(view.index.refused for view in self._views.values())

    @property
    def crowded_blocks(self) -> int:
        """Blocks ignored because of colliding names, in the scopes there are."""
        return sum(view.index.crowded for view in self._views.values())

    @property
    def bytes_held(self) -> int:
        """Memory of all indexes."""
        return sum(view.index.bytes_held for view in self._views.values())

    def check_integrity(self) -> None:
        """Assert that everything is sound. Slow: for tests and idle times."""
        for view in self._views.values():
            assert view.nodes, "a scope has members"
            numbers = {member.number: name for name, member in view.nodes.items()}
            assert numbers == view.names, "numbers name their node"
            for member in view.nodes.values():
                member.cursor.check_integrity()
            view.index.check_integrity()


def _perform(view: _View, scope: Scope, node: str, steps: Steps) -> Effects:
    """Carry out a cursor's steps; what is left to do for others."""
    asks: Effects = ()
    for step in steps:
        match step:
            case Apply():
                _apply(view, node, step.event)
            case Forget():
                view.empty(node)
            case Replace():
                view.empty(node)
                number = view.nodes[node].number
                for chunk in step.chunks:
                    view.index.store(number, chunk.tier, chunk.hashes)
            case Ask():
                asks += (AskSnapshot(scope, node),)
    return asks


def _apply(view: _View, node: str, event: Stored | Removed | Cleared) -> None:
    match event:
        case Stored():
            view.index.store(view.nodes[node].number, event.tier, event.hashes)
        case Removed():
            view.index.remove(view.nodes[node].number, event.tier, event.hashes)
        case Cleared():
            view.empty(node)
