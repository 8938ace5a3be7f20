"""A simulated registry service: the real `Registry`, and what a shell does around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvbm_schemas.block import pack
from kvbm_schemas.events import Beat, Cleared, Removed, Stored
from kvbm_schemas.message import Message
from kvbm_schemas.requests import Located, Lookup, Resync, SnapshotChunk
from kvbm_schemas.subjects import Scope
from kvbm_service.core.registry import AskSnapshot
from tests.simulation.directory import Entry, Watcher
from tests.simulation.network import Answer
from tests.simulation.oracles import Copy
from tests.simulation.timeline import Process

if TYPE_CHECKING:
    from tests.simulation.world import World

TICK_SECONDS = 0.1
SCOPE = Scope("namespace", "fingerprint")


class RegistryHost:
    """One life of a registry."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.process = Process()
        self.online = True
        self.core = world.make_registry()
        self._inboxes: dict[str, object] = {}
        """The question whose answers count, by node asked."""
        self._watcher = Watcher(world.directory, world.timeline, self._member_changed)
        world.timeline.every(TICK_SECONDS, self.process, self._tick)

    # -- for the oracles -------------------------------------------------------------------

    def cursor(self, node: str) -> tuple[int, int] | None:
        """How far it has followed `node`; None: not a member."""
        return next((view.at for view in self.core.nodes() if view.node == node), None)

    def view(self, node: str) -> frozenset[Copy]:
        """What it believes that `node` holds."""
        known = self.world.all_blocks
        placements = self.core.locate(SCOPE, pack(known))
        return frozenset(
            (block, holder.tier)
            for block, holders in zip(known, placements, strict=True)
            for holder in holders
            if holder.node == node
        )

    # -- what the shell does ---------------------------------------------------------------

    def receive(self, sender: str, message: Message, answer: Answer) -> None:
        """Something came over the bus."""
        now = self.world.timeline.now
        match message:
            case Lookup(hashes=hashes, asker=asker):
                answer(Located(segments=self.core.lookup(SCOPE, hashes, asker)))
            case Stored() | Removed() | Cleared() | Beat():
                self._ask(self.core.event(SCOPE, sender, message, now))
                if not isinstance(message, Beat):
                    self.world.oracles.view_is_a_past(self, sender)

    def _hear(self, node: str, inbox: object, message: Message) -> None:
        """Part of a snapshot has come."""
        if isinstance(message, SnapshotChunk) and self._inboxes.get(node) is inbox:
            self._ask(self.core.chunk(SCOPE, node, message, self.world.timeline.now))
            self.world.oracles.view_is_a_past(self, node)

    def _ask(self, effects: tuple[AskSnapshot, ...]) -> None:
        for effect in effects:
            node, inbox = effect.node, object()
            self._inboxes[node] = inbox
            self.world.network.ask_many(
                self,
                node,
                Resync(),
                lambda part, n=node, i=inbox: self._hear(n, i, part),  # type: ignore[misc]
            )

    def _member_changed(self, node: str, entry: Entry | None) -> None:
        now = self.world.timeline.now
        if entry is None:
            self.world.oracles.member_left(self, node)
            self._inboxes.pop(node, None)
            self._ask(self.core.left(SCOPE, node, now))
        else:
            at = self.cursor(node)
            if at is not None and at[0] != entry.record.epoch:
                self.world.oracles.member_left(self, node)  # another life, perhaps of less epoch
            self._ask(self.core.joined(SCOPE, node, entry.record.epoch, now))
        self.world.oracles.view_is_a_past(self, node)

    def _tick(self) -> None:
        self._watcher.look(self.world.network.reachable(self.name, "directory"))
        self._ask(self.core.tick(self.world.timeline.now))
