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
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from kvbm_schemas.codec import Decoder, Malformed, encode
from kvbm_schemas.message import Message
from kvbm_schemas.records import NodeRecord, RankRecord
from kvbm_schemas.requests import (
    Acquire,
    LeaseAnswer,
    Leased,
    Located,
    Lookup,
    Refused,
    Release,
    Renew,
    Resync,
)
from kvbm_schemas.step import Expect, Moved
from kvbm_schemas.subjects import REGISTRY_NODE, rank_what
from kvbm_service.adapters.bus import Bus, Delivery
from kvbm_service.adapters.directory import Change, Membership, OnChange, Watch
from kvbm_service.core.effects import (
    Announce,
    Answer,
    AskOwner,
    AskRegistry,
    Effect,
    GiveBack,
    KeepUp,
    Publish,
    TellRanks,
)
from kvbm_service.core.leader import Leader
from kvbm_service.errors import BusError, DirectoryError, NameTaken
from kvbm_service.network import Connect, Network
from kvbm_service.own_ranks import OwnRanks
from kvbm_service.presence import decode_record, join, stop_if_cancelled
from kvbm_service.snapshots import Snapshots

if TYPE_CHECKING:
    from kvbm_service.leader_service import LeaderService

_log = logging.getLogger(__name__)

TICK_SECONDS = 0.1
BEAT_SECONDS = 1.0
"""How often a leader says how far its events have come, and how full its tiers are."""

MAX_OUTGOING = 8192
"""Messages waiting to be published. Beyond, they are dropped: events are numbered, leases end."""

MAX_SUBJECTS_LOGGED = 256
"""Subjects on which something was malformed that are named in the log, once each."""

EXPECT_SECONDS = 10.0
"""Own ranks are told of readers for so much longer, and so not with every lease."""

MAX_QUESTIONS = 256
"""Questions to registries and owners under way. Beyond, they count as unanswered."""

_Outgoing = Publish | Announce | GiveBack | KeepUp | Answer

T = TypeVar("T")


class LeaderBus:
    """A leader's presence among the others. `run` it; the rest is called on the loop."""

    def __init__(self, leader: LeaderService, connect: Connect) -> None:
        self._leader = leader
        self._connect = connect
        self._network: Network | None = None
        self._membership: Membership | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._own_ranks = OwnRanks(leader)
        self._woken = asyncio.Event()
        self._outgoing: asyncio.Queue[_Outgoing] = asyncio.Queue(MAX_OUTGOING)
        self._waiting: dict[str, str] = {}
        """Lease requests that wait for our disk: where the answer goes, by token."""
        self._snapshots = Snapshots(leader, self._send_chunk)
        self._questions = 0
        self._expected_until = 0.0
        """Until when own ranks have been told to be there for readers."""
        self._warned: set[str] = set()

    async def run(self) -> None:
        """Connect, meet the ranks, take part; until cancelled."""
        self._network = await self._connect()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._tasks.create_task(self._send())
                self._tasks.create_task(self._tick())
                self._tasks.create_task(self._log_hit_rates())
                self._tasks.create_task(self._snapshots.run())
                self._tasks.create_task(self._own_ranks.run(self._network.directory))
                await self._until(lambda: self._leader.ready)
                self._tasks.create_task(self._take_part())
                watch = await self._watch(self._on_peer, self._key_prefix)
                try:
                    stop_if_cancelled()
                    await asyncio.Event().wait()
                finally:
                    await watch.close()
        finally:
            self._tasks = self._membership = None
            self._leader.on_core(_go_offline, None)
            await self._network.close()

    def wake(self) -> None:
        """Something about the ranks has changed."""
        self._expected_until = 0.0  # a new one has not been told
        self._woken.set()
        self._own_ranks.wake()

    def carry_out(self, effects: list[Effect]) -> None:
        """Do what the core wants done. What cannot be done now counts as lost."""
        for effect in effects:
            if isinstance(effect, _Outgoing):
                if not self._outgoing.full():
                    self._outgoing.put_nowait(effect)
                elif isinstance(effect, Answer):
                    self._waiting.pop(effect.lease, None)
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
            elif isinstance(effect, Answer):
                await self._answer(effect)
            elif isinstance(effect, KeepUp):
                subject = self._leader.scope.of(effect.node, "lease")
                await self._publish(subject, Renew(lease=effect.lease))
            else:
                subject = self._leader.scope.of(effect.node, "release")
                await self._publish(subject, Release(lease=effect.lease))

    async def _tell_all(self, what: str, message: Message) -> None:
        """Publish under this node's name, if that is ours."""
        if self._is_member:
            await self._publish(self._subject(what), message)

    async def _answer(self, effect: Answer) -> None:
        reply = self._waiting.pop(effect.lease, None)
        if reply is not None and (self._is_member or isinstance(effect.answer, Refused)):
            await self._publish(reply, effect.answer)

    async def _publish(self, subject: str, message: Message) -> None:
        # Events carry numbers, so whoever listens will notice; and leases end by themselves.
        with contextlib.suppress(BusError):
            await self._bus.publish(subject, self._encode(message))

    async def _ask(self, question: AskRegistry | AskOwner | TellRanks) -> None:
        try:
            if isinstance(question, AskRegistry):
                await self._ask_registry(question)
            elif isinstance(question, TellRanks):
                await self._tell_ranks(question)
            else:
                await self._ask_owner(question)
        except asyncio.CancelledError:
            self._tell_unanswered(question)  # lest the core waits for ever
            raise
        finally:
            self._questions -= 1

    async def _ask_registry(self, question: AskRegistry) -> None:
        message = Lookup(hashes=question.hashes, asker=self._leader.node)
        subject = self._leader.scope.of(REGISTRY_NODE, "lookup")
        patience = self._leader.settings.lookup_deadline_seconds
        asked_at = self._leader.now()
        answer = await self._request(subject, message, _located, patience)
        self._leader.metrics.lookup(self._leader.now() - asked_at, answer is not None)
        self._leader.on_core(
            lambda core: core.located(
                question.request, question.attempt, answer, self._leader.now()
            ),
            None,
        )

    async def _ask_owner(self, question: AskOwner) -> None:
        asked_at = self._leader.now()
        subject = self._leader.scope.of(question.node, "lease")
        message = Acquire(hashes=question.hashes, handed_over=question.handed_over)
        answer = await self._request(subject, message, _lease_answers, question.seconds)
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

    async def _tell_ranks(self, order: TellRanks) -> None:
        """Have all own ranks do something while the engine may be idle."""
        async with asyncio.TaskGroup() as ranks:
            said = [
                ranks.create_task(self._tell_rank(rank, order))
                for rank in range(self._leader.world_size)
            ]
        if not all(task.result() for task in said):
            self._leader.on_core(lambda core: core.unheard(order.order), None)

    async def _tell_rank(self, rank: int, order: TellRanks) -> bool:
        subject = self._subject(rank_what(rank))
        moved = await self._request(subject, order.order, _moved, order.seconds)
        if moved is None or moved.op != order.order.op:
            return False
        self._leader.on_core(lambda core: core.moved(moved, rank, self._leader.now()), None)
        return True

    def _tell_unanswered(self, question: AskRegistry | AskOwner | TellRanks) -> None:
        now = self._leader.now()
        if isinstance(question, TellRanks):
            self._leader.on_core(lambda core: core.unheard(question.order), None)
        elif isinstance(question, AskRegistry):
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

    async def _request(
        self, subject: str, message: Message, answers: Decoder[T], seconds: float
    ) -> T | None:
        """Ask; None if no usable answer comes before nobody waits for one any more.

        The core gives up at its own deadline. An answer that comes a little later still
        matters here: a lease that nobody waits for has to be given back.
        """
        try:
            reply = await self._bus.request(subject, self._encode(message), seconds + 1.0)
            return answers.decode(reply)
        except Malformed as error:
            self._reject(subject, error)
        except BusError as error:
            _log.debug("%s: %s", subject, error)
        return None

    # -- incoming --------------------------------------------------------------------------

    async def _serve(self, until: contextlib.AsyncExitStack) -> None:
        """Be asked under our name, which nobody else answers to meanwhile."""
        for what, handler in (
            ("lease", self._on_lease),
            ("release", self._on_release),
            ("snapshot", self._on_snapshot),
        ):
            subscription = await self._bus.subscribe(self._subject(what), handler)
            until.push_async_callback(subscription.close)

    async def _on_lease(self, delivery: Delivery) -> None:
        request = self._decode(delivery, _lease_requests)
        if request is not None:
            await self._expect_readers()
        if isinstance(request, Renew):
            lease = request.lease
            self._leader.on_core(lambda core: core.renew(lease, self._leader.now()), None)
        elif request is not None and delivery.reply and self._is_member:
            await self._lend(request, delivery.reply)

    async def _lend(self, request: Acquire, reply: str) -> None:
        token = secrets.token_hex(16)
        not_ready: LeaseAnswer | None = Refused(reason="not ready")
        self._waiting[token] = reply
        answer = self._leader.on_core(
            lambda core: core.acquire(
                request.hashes, token, self._leader.now(), request.handed_over
            ),
            not_ready,
        )
        if answer is not None:
            await self._answer(Answer(token, answer))

    async def _expect_readers(self) -> None:
        """Have own ranks be there for as long as whoever gets a lease now may read."""
        settings, now = self._leader.settings, self._leader.now()
        seconds = settings.lease_seconds + settings.transfer_timeout_seconds
        if now + seconds > self._expected_until:
            self._expected_until = now + seconds + EXPECT_SECONDS
            expect = Expect(seconds=seconds + EXPECT_SECONDS, instance=self._leader.instance)
            for rank in range(self._leader.world_size):
                await self._publish(self._subject(rank_what(rank)), expect)

    async def _on_release(self, delivery: Delivery) -> None:
        request = self._decode(delivery, _releases)
        if request is not None:
            self._leader.on_core(lambda core: core.release(request.lease), None)

    async def _on_snapshot(self, delivery: Delivery) -> None:
        if self._decode(delivery, _resyncs) is None or not delivery.reply or not self._is_member:
            return
        self._snapshots.ask(delivery.reply)

    async def _send_chunk(self, reply: str, payload: bytes) -> None:
        if self._is_member:
            with contextlib.suppress(BusError):  # whoever asked will ask again
                await self._bus.publish(reply, payload)

    def _decode(self, delivery: Delivery, decoder: Decoder[T]) -> T | None:
        try:
            return decoder.decode(delivery.payload)
        except Malformed as error:
            self._reject(delivery.subject, error)
            return None

    def _reject(self, subject: str, error: Malformed) -> None:
        self._leader.rejected += 1
        if subject not in self._warned and len(self._warned) < MAX_SUBJECTS_LOGGED:
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
                stop_if_cancelled()
                await asyncio.sleep(TICK_SECONDS)

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

    async def _take_part(self) -> None:
        """Be in the directory whenever it can be reached and all ranks are there."""
        while True:
            await self._until(lambda: self._leader.visible)
            await self._live()

    async def _live(self) -> None:
        """One life: with fresh numbers, until a rank is missing or another has our name."""
        assert self._network is not None
        key = self._key_prefix + self._leader.node
        lives = self._leader.lives
        self._membership, epoch = await join(
            self._network, key, self._leader.record, after=self._leader.epoch
        )
        serving = contextlib.AsyncExitStack()
        try:
            self._leader.begin(epoch)
            await self._serve(serving)
            while self._leader.visible and self._leader.lives == lives:
                if not await self._until(lambda: not self._leader.visible, BEAT_SECONDS):
                    await self._beat(self._membership, epoch)
        except NameTaken as error:
            _log.warning("node %s goes on by itself: %s", self._leader.node, error)
        finally:
            membership, self._membership = self._membership, None
            async with serving:
                await membership.leave()

    async def _until(self, is_so: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until something about the ranks is so; False if it is not within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while not is_so():
                    self._woken.clear()
                    await self._woken.wait()
        except TimeoutError:
            stop_if_cancelled()
            return False
        stop_if_cancelled()
        return True

    async def _beat(self, membership: Membership, epoch: int) -> None:
        beat = self._leader.on_core(lambda core: core.journal.beat(), None)
        if beat is not None:
            self.carry_out([Publish(beat)])  # behind the events that it speaks of
        try:
            await membership.update(self._leader.record(epoch))
        except NameTaken:
            raise
        except DirectoryError as error:
            _log.debug("directory: %s", error)

    async def _tick(self) -> None:
        while True:
            online = self._bus.connected
            if not online:
                self._expected_until = 0.0  # whatever was said may be lost

            def tick(core: Leader, online: bool = online) -> None:
                core.peers.online = online
                core.tick(self._leader.now())

            self._leader.on_core(tick, None)
            await asyncio.sleep(TICK_SECONDS)

    async def _log_hit_rates(self) -> None:
        interval = self._leader.settings.cache_stats_log_interval_seconds
        while interval:
            await asyncio.sleep(interval)
            self._leader.log_hit_rates()

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


def _go_offline(core: Leader) -> None:
    core.peers.online = False


_lease_requests: Decoder[Acquire | Renew] = Decoder(Acquire | Renew)  # type: ignore[arg-type]
_releases = Decoder(Release)
_resyncs = Decoder(Resync)
_located = Decoder(Located)
_moved = Decoder(Moved)
_lease_answers: Decoder[Leased | Refused] = Decoder(LeaseAnswer)  # type: ignore[arg-type]
