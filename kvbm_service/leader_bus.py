"""What a leader does on the bus: all of it on one event loop, none of it on the engine's thread.

It asks registries and owners what the core wants to know, publishes the node's events, grants
leases and snapshots, and keeps the node in the directory. A node's name is used only while the
directory says that it is ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from typing import TYPE_CHECKING, TypeVar

from kvbm_schemas.block import Tier, pack
from kvbm_schemas.codec import Decoder, Malformed, encode
from kvbm_schemas.message import MAX_BATCH_BLOCKS, Message
from kvbm_schemas.records import NodeRecord, RankRecord
from kvbm_schemas.requests import (
    Acquire,
    LeaseAnswer,
    Leased,
    Located,
    Lookup,
    Refused,
    Release,
    Resync,
    SnapshotChunk,
)
from kvbm_schemas.subjects import REGISTRY_NODE
from kvbm_service.adapters.bus import Bus, Delivery
from kvbm_service.adapters.directory import Change, Membership, OnChange, Watch
from kvbm_service.core.effects import Announce, AskOwner, AskRegistry, Effect, GiveBack, Publish
from kvbm_service.core.leader import Leader
from kvbm_service.errors import BusError, BusUnavailable, DirectoryError, LayoutError, RanksMissing
from kvbm_service.network import Connect, Network
from kvbm_service.presence import decode_record, join

if TYPE_CHECKING:
    from kvbm_service.leader_service import LeaderService

_log = logging.getLogger(__name__)

TICK_SECONDS = 0.1
BEAT_SECONDS = 1.0
"""How often a leader says how far its events have come, and how full its tiers are."""

MAX_OUTGOING = 8192
"""Messages waiting to be published. Beyond, they are dropped: events are numbered, leases end."""

MAX_QUESTIONS = 256
"""Questions to registries and owners under way. Beyond, they count as unanswered."""

SNAPSHOT_CHUNK_BLOCKS = MAX_BATCH_BLOCKS // 2

T = TypeVar("T")


class LeaderBus:
    """A leader's presence among the others. `run` it; the rest is called on the loop."""

    def __init__(self, leader: LeaderService, connect: Connect) -> None:
        self._leader = leader
        self._connect = connect
        self._network: Network | None = None
        self._membership: Membership | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._woken = asyncio.Event()
        self._outgoing: asyncio.Queue[Publish | Announce | GiveBack] = asyncio.Queue(MAX_OUTGOING)
        self._questions = 0
        self._warned: set[str] = set()

    async def run(self) -> None:
        """Connect, meet the ranks, take part; until cancelled."""
        self._network = await self._connect()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._tasks.create_task(self._send())
                self._tasks.create_task(self._tick())
                await self._meet_ranks()
                self._tasks.create_task(self._take_part())
                watch = await self._watch(self._on_peer, self._key_prefix)
                self._tasks.create_task(_close_at_the_end(watch))
        finally:
            self._tasks = self._membership = None
            self._leader.on_core(_go_offline, None)
            await self._network.bus.close()

    def wake(self) -> None:
        """Something about the ranks has changed."""
        self._woken.set()

    def carry_out(self, effects: list[Effect]) -> None:
        """Do what the core wants done. What cannot be done now counts as lost."""
        for effect in effects:
            if isinstance(effect, Publish | Announce | GiveBack):
                if not self._outgoing.full():
                    self._outgoing.put_nowait(effect)
            elif self._tasks is None or self._questions >= MAX_QUESTIONS:
                self._tell_unanswered(effect)
            else:
                self._questions += 1
                self._tasks.create_task(self._ask(effect))

    # -- outgoing --------------------------------------------------------------------------

    async def _send(self) -> None:
        while True:
            effect = await self._outgoing.get()
            if isinstance(effect, Publish):
                await self._tell_all("events", effect.event)
            elif isinstance(effect, Announce):
                await self._tell_all("loads", effect.loaded)
            else:
                subject = self._leader.scope.of(effect.node, "release")
                await self._publish(subject, Release(lease=effect.lease))

    async def _tell_all(self, what: str, message: Message) -> None:
        """Publish under this node's name, if that is ours."""
        if self._is_member:
            await self._publish(self._subject(what), message)

    async def _publish(self, subject: str, message: Message) -> None:
        # Events carry numbers, so whoever listens will notice; and leases end by themselves.
        with contextlib.suppress(BusUnavailable):
            await self._bus.publish(subject, self._encode(message))

    async def _ask(self, question: AskRegistry | AskOwner) -> None:
        try:
            if isinstance(question, AskRegistry):
                await self._ask_registry(question)
            else:
                await self._ask_owner(question)
        finally:
            self._questions -= 1

    async def _ask_registry(self, question: AskRegistry) -> None:
        message = Lookup(hashes=question.hashes, asker=self._leader.node)
        subject = self._leader.scope.of(REGISTRY_NODE, "lookup")
        answer = await self._request(subject, message, _located)
        self._leader.on_core(
            lambda core: core.located(
                question.request, question.attempt, answer, self._leader.now()
            ),
            None,
        )

    async def _ask_owner(self, question: AskOwner) -> None:
        asked_at = self._leader.now()
        subject = self._leader.scope.of(question.node, "lease")
        answer = await self._request(subject, Acquire(hashes=question.hashes), _lease_answers)
        self._leader.on_core(
            lambda core: core.answered(
                question.request,
                question.attempt,
                question.node,
                question.start,
                answer,
                asked_at,
                self._leader.now(),
            ),
            None,
        )

    def _tell_unanswered(self, question: AskRegistry | AskOwner) -> None:
        now = self._leader.now()
        if isinstance(question, AskRegistry):
            self._leader.on_core(
                lambda core: core.located(question.request, question.attempt, None, now), None
            )
        else:
            refused = Refused(reason="too many questions at once")
            self._leader.on_core(
                lambda core: core.answered(
                    question.request, question.attempt, question.node, question.start,
                    refused, now, now,
                ),
                None,
            )  # fmt: skip

    async def _request(self, subject: str, message: Message, answers: Decoder[T]) -> T | None:
        """Ask; None if no usable answer comes before nobody waits for one any more.

        The core gives up at its own deadline. An answer that comes a little later still
        matters here: a lease that nobody waits for has to be given back.
        """
        patience = self._leader.settings.lookup_deadline_seconds + 1.0
        try:
            reply = await self._bus.request(subject, self._encode(message), patience)
            return answers.decode(reply)
        except Malformed as error:
            self._reject(subject, error)
        except BusError as error:
            _log.debug("%s: %s", subject, error)
        return None

    # -- incoming --------------------------------------------------------------------------

    async def _serve(self) -> None:
        for what, handler in (
            ("lease", self._on_lease),
            ("release", self._on_release),
            ("snapshot", self._on_snapshot),
        ):
            await self._bus.subscribe(self._subject(what), handler)

    async def _on_lease(self, delivery: Delivery) -> None:
        request = self._decode(delivery, _acquires)
        if request is None or not delivery.reply or not self._is_member:
            return
        token = secrets.token_hex(16)
        not_ready: Leased | Refused = Refused(reason="not ready")
        answer = self._leader.on_core(
            lambda core: core.acquire(request.hashes, token, self._leader.now()), not_ready
        )
        await self._publish(delivery.reply, answer)

    async def _on_release(self, delivery: Delivery) -> None:
        request = self._decode(delivery, _releases)
        if request is not None:
            self._leader.on_core(lambda core: core.release(request.lease), None)

    async def _on_snapshot(self, delivery: Delivery) -> None:
        if self._decode(delivery, _resyncs) is None or not delivery.reply or not self._is_member:
            return
        snapshot = self._leader.on_core(lambda core: core.snapshot(), None)
        if snapshot is None:
            return
        beat, blocks = snapshot
        total = max(1, -(-len(blocks) // SNAPSHOT_CHUNK_BLOCKS))
        for index in range(total):
            part = blocks[index * SNAPSHOT_CHUNK_BLOCKS : (index + 1) * SNAPSHOT_CHUNK_BLOCKS]
            chunk = SnapshotChunk(
                epoch=beat.epoch,
                seq=beat.seq,
                index=index,
                total=total,
                tier=Tier.HOST,
                hashes=pack(part),
            )
            await self._publish(delivery.reply, chunk)

    def _decode(self, delivery: Delivery, decoder: Decoder[T]) -> T | None:
        try:
            return decoder.decode(delivery.payload)
        except Malformed as error:
            self._reject(delivery.subject, error)
            return None

    def _reject(self, subject: str, error: Malformed) -> None:
        self._leader.rejected += 1
        if subject not in self._warned:
            self._warned.add(subject)
            _log.warning("rejected a message on %s: %s (said once)", subject, error)

    # -- membership ------------------------------------------------------------------------

    async def _watch(self, on_change: OnChange, prefix: str) -> Watch:
        """Watch the directory, as soon as it can be reached."""
        assert self._network is not None
        while True:
            try:
                return await self._network.directory.watch(on_change, prefix)
            except DirectoryError as error:
                _log.debug("directory: %s", error)
                await asyncio.sleep(TICK_SECONDS)

    def _on_own_rank(self, change: Change) -> None:
        record = None if change.value is None else decode_record(change.key, change.value)
        if isinstance(record, RankRecord) and self._leader.is_own(record):
            self._attach(record)

    def _on_peer(self, change: Change) -> None:
        node, *rank = change.key.removeprefix(self._key_prefix).split(".")
        if node == self._leader.node:
            return
        record = None if change.value is None else decode_record(change.key, change.value)
        if not rank:
            leader = record if isinstance(record, NodeRecord) else None
            self._leader.on_core(lambda core: core.peers.leader_changed(node, leader), None)
        elif rank[0].isdecimal():
            worker = record if isinstance(record, RankRecord) else None
            number = int(rank[0])
            self._leader.on_core(lambda core: core.peers.rank_changed(node, number, worker), None)

    def _attach(self, record: RankRecord) -> None:
        try:
            self._leader.attach(record)
        except LayoutError as error:
            _log.error("%s", error)

    async def _meet_ranks(self) -> None:
        """Wait until all ranks have reported, in the directory or through the engine."""
        own_ranks = f"{self._key_prefix}{self._leader.node}."
        watching = asyncio.create_task(self._watch(self._on_own_rank, own_ranks))
        try:
            await self._wait_for_ranks()
            await watching  # what comes next needs the directory, too
        finally:
            if watching.done() and not watching.cancelled():
                await watching.result().close()
            else:
                watching.cancel()

    async def _wait_for_ranks(self) -> None:
        late = False
        while not self._leader.ready:
            try:
                self._leader.require_ranks()
            except RanksMissing as error:
                if not late:
                    _log.error("%s; serving without a cache meanwhile", error)
                late = True
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), BEAT_SECONDS)

    async def _take_part(self) -> None:
        """Be in the directory, with fresh numbers, whenever it can be reached."""
        assert self._network is not None
        key = self._key_prefix + self._leader.node
        self._membership, epoch = await join(self._network, key, self._leader.record)
        try:
            self._leader.begin(epoch)
            await self._serve()
            while True:
                await asyncio.sleep(BEAT_SECONDS)
                await self._beat(self._membership, epoch)
        finally:
            await self._membership.leave()

    async def _beat(self, membership: Membership, epoch: int) -> None:
        beat = self._leader.on_core(lambda core: core.journal.beat(), None)
        if beat is not None:
            self.carry_out([Publish(beat)])  # behind the events that it speaks of
        try:
            await membership.update(self._leader.record(epoch))
        except DirectoryError as error:
            _log.debug("directory: %s", error)

    async def _tick(self) -> None:
        while True:
            online = self._bus.connected

            def tick(core: Leader, online: bool = online) -> None:
                core.online = online
                core.tick(self._leader.now())

            self._leader.on_core(tick, None)
            await asyncio.sleep(TICK_SECONDS)

    # -- small things ------------------------------------------------------------------------

    @property
    def _bus(self) -> Bus:
        assert self._network is not None
        return self._network.bus

    @property
    def _is_member(self) -> bool:
        """Whether this node's name is ours: not while another live node has it."""
        return self._membership is not None and self._membership.alive

    @property
    def _key_prefix(self) -> str:
        return ".".join(self._leader.scope) + "."

    def _subject(self, what: str) -> str:
        return self._leader.scope.of(self._leader.node, what)

    def _encode(self, message: Message) -> bytes:
        return encode(message, self._leader.settings.wire)


async def _close_at_the_end(watch: Watch) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await watch.close()


def _go_offline(core: Leader) -> None:
    core.online = False


_acquires = Decoder(Acquire)
_releases = Decoder(Release)
_resyncs = Decoder(Resync)
_located = Decoder(Located)
_lease_answers: Decoder[Leased | Refused] = Decoder(LeaseAnswer)  # type: ignore[arg-type]
