"""The registry service: the registry's core on a bus and a directory.

It hears every leader's events, learns from the directory who is a member, asks members for
snapshots, and answers lookups from memory alone. It keeps nothing that it could not ask for
again, so it may be killed at any time; any number of them share the questions of a cluster.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any, Generic, NamedTuple, TypeVar

from kvbm_schemas.codec import Decoder, Malformed, Wire, encode
from kvbm_schemas.events import BlockEvent
from kvbm_schemas.message import MAX_MESSAGE_BYTES, Message
from kvbm_schemas.records import DirectoryRecord, NodeRecord
from kvbm_schemas.requests import Locate, Located, Lookup, Placements, Resync, SnapshotChunk
from kvbm_schemas.subjects import REGISTRY_NODE, Scope, every, is_token, parse
from kvbm_service.adapters.bus import Bus, Delivery
from kvbm_service.adapters.directory import Change, Directory, Watch
from kvbm_service.core.block_index import compile_now
from kvbm_service.core.cursor import State
from kvbm_service.core.registry import DEFAULT_LIMITS, AskSnapshot, Effects, Limits, Registry
from kvbm_service.core.registry_counts import RegistryCounts
from kvbm_service.errors import BusError, DirectoryError

QUEUE = "registry"
"""The queue group in which registries share lookups."""
TICK_SECONDS = 0.25
SNAPSHOT_SECONDS = 1.0
"""How long each chunk of a snapshot may take …"""
MAX_SNAPSHOT_SECONDS = 30.0
"""… and all of them together."""
MAX_SNAPSHOTS_AT_ONCE = 16
"""Snapshots fetched at the same time; further ones wait for their turn."""
MAX_SENDERS_LOGGED = 1_024
"""Senders of malformed messages that are named in the log, once each."""
EVENTS_PER_TURN = 64
"""Events applied before others get a turn, when many have piled up."""
RETRY_SECONDS = 1.0
"""Pause between attempts to reach the directory."""

M = TypeVar("M", bound=Message)

log = logging.getLogger(__name__)


class RegistryStatus(NamedTuple):
    """How a registry is doing."""

    connected: bool
    scopes: int
    nodes: int
    syncing: int
    """Nodes of which something is known to be missing."""
    blocks: int
    copies: int
    bytes_held: int
    refused_blocks: int
    """Copies not taken in because of a limit, in the scopes there are."""
    counts: RegistryCounts
    """The registry's own: goes on counting."""


class _Read(NamedTuple, Generic[M]):
    """A message, and where it belongs."""

    scope: Scope
    node: str
    message: M


class RegistryService:
    """One registry. `run` it; ask `status` how it is doing."""

    def __init__(
        self,
        bus: Bus,
        directory: Directory,
        *,
        events: Bus | None = None,
        wire: Wire = Wire.MSGPACK,
        limits: Limits = DEFAULT_LIMITS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Neither `bus` nor `directory` is closed by it.

        With `events`, another connection, events come over that one: then questions do not
        have to wait behind them, however many there are.
        """
        self.ready = asyncio.Event()
        """Set once questions are answered (with what little is known then)."""
        self._bus = bus
        self._events_bus = events or bus
        self._directory = directory
        self._wire = wire
        self._clock = clock
        self._registry = Registry(secrets.randbits(64), limits)
        self._tasks: asyncio.TaskGroup | None = None
        self._fetches: dict[AskSnapshot, asyncio.Task[None]] = {}
        self._wanted: set[AskSnapshot] = set()
        self._turns = asyncio.Semaphore(MAX_SNAPSHOTS_AT_ONCE)
        self._events_this_turn = 0
        self._senders_logged: set[str] = set()
        self._events: Decoder[BlockEvent] = _decoder(BlockEvent)
        self._chunks: Decoder[SnapshotChunk] = _decoder(SnapshotChunk)
        self._lookups: Decoder[Lookup] = _decoder(Lookup)
        self._locates: Decoder[Locate] = _decoder(Locate)
        self._records: Decoder[DirectoryRecord] = _decoder(DirectoryRecord)

    async def run(self) -> None:
        """Serve until cancelled."""
        await asyncio.to_thread(compile_now)
        async with asyncio.TaskGroup() as self._tasks, AsyncExitStack() as stack:
            for bus, subject, handler, queue in (
                (self._events_bus, every("events"), self._on_event, ""),
                (self._bus, every("lookup", REGISTRY_NODE), self._on_lookup, QUEUE),
                (self._bus, every("locate", REGISTRY_NODE), self._on_locate, QUEUE),
            ):
                subscription = await bus.subscribe(subject, handler, queue)
                stack.push_async_callback(subscription.close)
            self.ready.set()
            watch = await self._watch()
            stack.push_async_callback(watch.close)
            while True:
                await asyncio.sleep(TICK_SECONDS)
                self._perform(self._registry.tick(self._clock()))

    def status(self) -> RegistryStatus:
        """How it is doing, now."""
        registry = self._registry
        nodes = list(registry.nodes())
        return RegistryStatus(
            connected=self._bus.connected and self._events_bus.connected,
            scopes=registry.scopes,
            nodes=len(nodes),
            syncing=sum(node.state is State.SYNCING for node in nodes),
            blocks=registry.blocks,
            copies=registry.copies,
            bytes_held=registry.bytes_held,
            refused_blocks=registry.refused_blocks + registry.crowded_blocks,
            counts=registry.counts,
        )

    # What comes in

    async def _on_event(self, delivery: Delivery) -> None:
        read = self._read(self._events, delivery)
        if read is None:
            return
        self._perform(self._registry.event(read.scope, read.node, read.message, self._clock()))
        self._events_this_turn += 1
        if self._events_this_turn >= EVENTS_PER_TURN:
            self._events_this_turn = 0
            await asyncio.sleep(0)

    async def _on_lookup(self, delivery: Delivery) -> None:
        read = self._read(self._lookups, delivery)
        if read is not None:
            lookup = read.message
            segments = self._registry.lookup(read.scope, lookup.hashes, lookup.asker)
            await self._answer(delivery, Located(segments=segments))

    async def _on_locate(self, delivery: Delivery) -> None:
        read = self._read(self._locates, delivery)
        if read is not None:
            holders = self._registry.locate(read.scope, read.message.hashes)
            await self._answer(delivery, Placements(holders=holders))

    def _on_change(self, change: Change) -> None:
        """The directory says that someone is, or is no longer, there."""
        tokens = change.key.split(".")
        if len(tokens) == 4:
            return  # a rank
        if len(tokens) != 3 or not all(map(is_token, tokens)) or tokens[2] == REGISTRY_NODE:
            self._reject(change.key, "not a key of ours")
            return
        scope, node, now = Scope(tokens[0], tokens[1]), tokens[2], self._clock()
        if change.value is None:
            self._perform(self._registry.left(scope, node, now))
            return
        record = self._decode(self._records, change.value, change.key)
        if record is None:
            return
        if not isinstance(record, NodeRecord) or record.node != node:
            self._reject(change.key, "not the record of this node's leader")
            return
        self._perform(self._registry.joined(scope, node, record.epoch, now))

    def _read(self, decoder: Decoder[M], delivery: Delivery) -> _Read[M] | None:
        """Read a message and where it belongs; None, counted, if either makes no sense."""
        subject = parse(delivery.subject)
        if subject is None:
            self._reject(delivery.subject, "not a subject of ours")
            return None
        message = self._decode(decoder, delivery.payload, delivery.subject)
        if message is None:
            return None
        return _Read(Scope(subject.namespace, subject.fingerprint), subject.node, message)

    def _decode(self, decoder: Decoder[M], payload: bytes, sender: str) -> M | None:
        """Read a message; None, counted, if it is malformed."""
        try:
            return decoder.decode(payload)
        except Malformed as error:
            self._reject(sender, str(error))
            return None

    def _reject(self, sender: str, why: str) -> None:
        self._registry.counts.malformed += 1
        if sender not in self._senders_logged and len(self._senders_logged) < MAX_SENDERS_LOGGED:
            self._senders_logged.add(sender)
            log.warning("ignoring what comes from %s while it is malformed: %s", sender, why)

    # What goes out

    async def _answer(self, delivery: Delivery, message: Message) -> None:
        if not delivery.reply:
            return
        payload = encode(message, self._wire)
        if len(payload) > MAX_MESSAGE_BYTES:
            self._registry.counts.oversized_answers += 1
            return
        try:
            await self._bus.publish(delivery.reply, payload)
        except BusError as error:
            log.debug("an answer was lost: %s", error)  # the asker's deadline covers it

    def _perform(self, effects: Effects) -> None:
        if self._tasks is None:
            return
        for ask in effects:
            self._wanted.add(ask)
            if ask not in self._fetches:
                self._fetches[ask] = self._tasks.create_task(self._fetch(ask))

    async def _fetch(self, ask: AskSnapshot) -> None:
        """Ask for a snapshot as long as one is wanted. A new question voids the one before."""
        try:
            while ask in self._wanted:
                async with self._turns:
                    self._wanted.discard(ask)
                    try:
                        async with asyncio.timeout(MAX_SNAPSHOT_SECONDS):
                            await self._fetch_once(ask)
                    except (BusError, TimeoutError) as error:
                        # The registry asks again when its patience is over.
                        log.debug("no snapshot of %s: %s", ask.node, error)
        finally:
            self._wanted.discard(ask)
            del self._fetches[ask]

    async def _fetch_once(self, ask: AskSnapshot) -> None:
        subject = ask.scope.of(ask.node, "snapshot")
        answers = self._bus.request_many(subject, encode(Resync(), self._wire), SNAPSHOT_SECONDS)
        seen = 0
        async with aclosing(answers):
            async for payload in answers:
                chunk = self._decode(self._chunks, payload, subject)
                if chunk is None:
                    return
                effects = self._registry.chunk(ask.scope, ask.node, chunk, self._clock())
                self._perform(effects)
                seen += 1
                if seen >= chunk.total or ask in self._wanted:
                    return

    async def _watch(self) -> Watch:
        said = ""
        while True:
            try:
                return await self._directory.watch(self._on_change)
            except DirectoryError as error:
                if str(error) != said:
                    said = str(error)
                    log.warning("nobody is known yet: %s; trying again in the background", said)
                await asyncio.sleep(RETRY_SECONDS)


def _decoder(kind: Any) -> Any:
    """A decoder for `kind`, which may be a union (not a `type`, so mypy would refuse it)."""
    return Decoder(kind)
