"""Whatever arrives on whatever subject: what is not the message expected there changes nothing,
and is counted.

A real leader, one of its ranks and a real registry on a real NATS server; the rubbish is published
like anyone on the bus could.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kvbm_schemas.block import BlockHash, Tier
from kvbm_schemas.codec import Decoder, Wire, encode
from kvbm_schemas.events import Beat, Stored
from kvbm_schemas.message import MAX_MESSAGE_BYTES, Message
from kvbm_schemas.records import RankRecord, SlabRecord
from kvbm_schemas.requests import Acquire, Locate, Lookup, Refused, Release, Resync
from kvbm_schemas.step import Expect, Fetch, Lend, Moved, StepResults
from kvbm_schemas.subjects import REGISTRY_NODE, Scope, rank_what
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_directory import NatsDirectory
from kvbm_service.adapters.nats_server import EmbeddedNats
from kvbm_service.errors import NoAnswer
from kvbm_service.leader_service import LeaderService
from kvbm_service.network import over_nats
from kvbm_service.registry_service import RegistryService
from kvbm_service.settings import Settings
from kvbm_service.worker_bus import WorkerBus
from tests.patience import until

SCOPE = Scope("wire", "0123456789abcdef")
NODE = "node-1"
CHAIN = [BlockHash(bytes([number]) * 16) for number in range(1, 9)]
DEADLINE_SECONDS = 30.0
ANSWER_SECONDS = 0.2
RANK = RankRecord(
    node=NODE,
    rank=0,
    world_size=1,
    agent="agent",
    agent_metadata=b"",
    slab=SlabRecord(base=0, headers=0, slots=64, slot_bytes=64, header_bytes=32),
    device_blocks=64,
    instance="this life",
)
FETCH = Fetch(
    op=7, hashes=CHAIN[0], fills=bytes(8), disk=bytes(4), host=bytes(4), instance=RANK.instance
)
EXPECT = Expect(seconds=5.0, instance=RANK.instance)

VALID: dict[str, list[Message]] = {
    "events": [
        Stored(epoch=1, seq=1, tier=Tier.HOST, hashes=CHAIN[0]),
        Beat(epoch=1, seq=1),
    ],
    "lease": [Acquire(hashes=CHAIN[0])],
    "release": [Release(lease="0" * 32)],
    "snapshot": [Resync()],
    rank_what(0): [FETCH, EXPECT],
    "lookup": [Lookup(hashes=CHAIN[0])],
    "locate": [Locate(hashes=CHAIN[0])],
}
"""What each subject carries."""

T = TypeVar("T")


class World:
    """A node and a registry that know each other, and a bus to throw things at them."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.leader = _leader(url)
        self.fetched: list[Fetch] = []
        """What the rank was made to carry out."""
        self.expected: list[float] = []
        """For how long it was told of readers."""
        self.rank = WorkerBus(
            RANK,
            SCOPE,
            over_nats(Settings(nats_url=url), "rank"),
            self._fetch,
            self.expected.append,
        )
        self.bus, self.registry = self._do(self._open(url))
        self._serving = [
            asyncio.run_coroutine_threadsafe(main, self._loop)
            for main in (self.registry.run(), self.rank.run())
        ]
        until(lambda: self.registry.status().copies == len(CHAIN))
        until(lambda: self.ask_rank(FETCH) is not None)
        self.fetched.clear()

    def _fetch(self, order: Fetch | Lend, tell: Callable[[Moved], None]) -> bool:
        assert isinstance(order, Fetch)
        self.fetched.append(order)
        tell(Moved(op=order.op))
        return True

    async def _open(self, url: str) -> tuple[NatsBus, RegistryService]:
        bus = await NatsBus.connect(url)
        return bus, RegistryService(bus, NatsDirectory(bus))

    def _do(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(DEADLINE_SECONDS)

    def publish(self, subject: str, payload: bytes) -> None:
        """Throw something at whoever listens on `subject`."""
        self._do(self.bus.publish(subject, payload, reply="_INBOX.nobody"))

    def ask_rank(self, order: Fetch | Expect) -> Moved | None:
        """What the rank answers; None if nothing."""
        subject = SCOPE.of(NODE, rank_what(0))
        try:
            reply = self._do(self.bus.request(subject, encode(order), ANSWER_SECONDS))
        except NoAnswer:
            return None
        return Decoder(Moved).decode(reply)

    def rejected(self) -> int:
        """How much rubbish was counted so far."""
        malformed = self.registry.status().counts.malformed
        return self.leader.rejected + malformed + self.rank.rejected

    def state(self) -> object:
        """What must not change."""
        beat, blocks = self.leader.on_core(lambda core: core.snapshot(), (None, None))
        status = self.registry.status()
        return (
            beat,
            blocks,
            self.leader.on_core(lambda core: core.status(), None),
            (
                status.nodes,
                status.blocks,
                status.copies,
            ),
            len(self.fetched),
        )

    def close(self) -> None:
        """End both."""
        for serving in self._serving:
            serving.cancel()
        self.leader.close()
        self._do(self.bus.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _leader(url: str) -> LeaderService:
    """A leader whose one rank has saved CHAIN."""
    chosen = Settings(nats_url=url)
    leader = LeaderService(
        chosen, SCOPE, NODE, 1, over_nats(chosen, "wire test"), instance=RANK.instance
    )
    leader.attach(RANK)
    leader.store("request", None, CHAIN, list(range(len(CHAIN))))
    saves = leader.take_commands().saves
    leader.report([StepResults(rank=0, moved=tuple(Moved(op=save.op) for save in saves))])
    leader.start()
    return leader


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with EmbeddedNats() as server:
        world = World(server.url)
        yield world
        world.close()


def subject(what: str) -> str:
    """Where `what` is sent."""
    return SCOPE.of(REGISTRY_NODE if what in ("lookup", "locate") else NODE, what)


SUBJECTS = sorted(VALID)


def wrong_messages(what: str) -> list[bytes]:
    """Well-formed messages of ours that do not belong there."""
    others = [message for other in SUBJECTS if other != what for message in VALID[other]]
    return [encode(message) for message in [*others, Refused(reason="no")]]


@st.composite
def rubbish(draw: st.DrawFn, what: str) -> bytes:
    """Something that is no valid message for `what`."""
    valid = [encode(message, wire) for message in VALID[what] for wire in Wire]
    kind = draw(st.sampled_from(["random", "cut", "wrong", "wrong json", "text"]))
    if kind == "random":
        return draw(st.binary(min_size=0, max_size=64).filter(lambda b: b[:1] != b"\x81"))
    if kind == "cut":
        whole = draw(st.sampled_from(valid))
        return whole[: draw(st.integers(min_value=0, max_value=len(whole) - 1))]
    if kind == "wrong":
        return draw(st.sampled_from(wrong_messages(what)))
    if kind == "wrong json":
        field = draw(st.sampled_from(["epoch", "hashes", "lease", "tier", "type"]))
        return (
            b'{"type":"'
            + VALID[what][0].__struct_config__.tag.encode()
            + (b'","' + field.encode() + b'":{"not":["this"]},"type":7}')
        )
    return draw(st.text(min_size=1, max_size=32)).encode()


@pytest.mark.parametrize("what", SUBJECTS)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_rubbish_on_any_subject_changes_nothing_and_is_counted(
    world: World, what: str, data: st.DataObject
) -> None:
    payload = data.draw(rubbish(what))
    before, counted = world.state(), world.rejected()
    world.publish(subject(what), payload)
    until(lambda: world.rejected() == counted + 1)
    assert world.state() == before


@pytest.mark.parametrize("what", SUBJECTS)
def test_a_message_larger_than_the_limit_is_not_even_read(world: World, what: str) -> None:
    before, counted = world.state(), world.rejected()
    world.publish(subject(what), b"\x00" * MAX_MESSAGE_BYTES)
    until(lambda: world.rejected() == counted + 1)
    assert world.state() == before


def test_events_of_a_node_that_is_no_member_change_nothing(world: World) -> None:
    before = world.state()
    counted = world.registry.status().counts.unknown_sender
    stranger = Stored(epoch=1, seq=1, tier=Tier.HOST, hashes=CHAIN[0])
    world.publish(SCOPE.of("stranger", "events"), encode(stranger))
    until(lambda: world.registry.status().counts.unknown_sender == counted + 1)
    assert world.state() == before


def test_a_release_of_a_lease_that_was_never_given_changes_nothing(world: World) -> None:
    before = world.state()
    world.publish(SCOPE.of(NODE, "release"), encode(Release(lease="f" * 32)))
    counted = world.rejected()
    world.publish(SCOPE.of(NODE, "release"), b"rubbish")  # arrives after it
    until(lambda: world.rejected() == counted + 1)
    assert world.state() == before


def test_a_fetch_is_carried_out_and_answered(world: World) -> None:
    world.fetched.clear()
    assert world.ask_rank(FETCH) == Moved(op=FETCH.op)
    assert world.fetched == [FETCH]
    world.fetched.clear()


def test_a_rank_hears_of_readers(world: World) -> None:
    counted = len(world.expected)
    world.publish(subject(rank_what(0)), encode(EXPECT))
    until(lambda: EXPECT.seconds in world.expected[counted:])


@pytest.mark.parametrize("instance", ["", "another life"])
@pytest.mark.parametrize("order", [FETCH, EXPECT], ids=["fetch", "expect"])
def test_what_is_meant_for_another_life_of_the_node_is_left_alone(
    world: World, order: Fetch | Expect, instance: str
) -> None:
    before, expected = world.state(), len(world.expected)
    assert world.ask_rank(replace(order, instance=instance)) is None
    assert (world.state(), len(world.expected)) == (before, expected)
