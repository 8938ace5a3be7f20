"""Leases: nobody guesses one, and none opens what its holder could not name."""

from __future__ import annotations

import re

from kvbm_schemas.block import BlockHash, count, pack
from kvbm_schemas.codec import Decoder, encode
from kvbm_schemas.requests import Acquire, LeaseAnswer, Leased, Refused, Release
from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.core.columns import unpack_u32
from tests.patience import eventually
from tests.security.cluster import CHAINS, SCOPE, Cluster

_answers: Decoder[LeaseAnswer] = Decoder(LeaseAnswer)  # type: ignore[arg-type]
OWNER = "node-1"


async def acquire(bus: NatsBus, hashes: bytes) -> LeaseAnswer:
    """What the owner answers."""
    payload = encode(Acquire(hashes=hashes))
    return _answers.decode(await bus.request(SCOPE.of(OWNER, "lease"), payload, 5.0))


async def granted(bus: NatsBus, hashes: bytes) -> Leased:
    """A lease on these blocks."""
    answer = await acquire(bus, hashes)
    assert isinstance(answer, Leased)
    return answer


def pinned(cluster: Cluster) -> int:
    """Slots of the owner that leases hold."""
    status = cluster.leaders[OWNER].on_core(lambda core: core.status(), ())
    return sum(tier.pinned for tier in status)


async def test_a_lease_is_called_by_128_random_bits(cluster: Cluster) -> None:
    bus = await cluster.bus("node-2")
    tokens = [(await granted(bus, CHAINS[OWNER][0])).lease for _ in range(200)]
    assert all(re.fullmatch("[0-9a-f]{32}", token) for token in tokens)
    assert len(set(tokens)) == len(tokens)
    ones = sum(int(token, 16).bit_count() for token in tokens) / (128 * len(tokens))
    assert 0.45 < ones < 0.55


async def test_blocks_of_another_salt_have_other_names_and_are_not_lent(cluster: Cluster) -> None:
    bus = await cluster.bus("node-2")
    salted = [BlockHash(bytes([200 + number]) * 16) for number in range(4)]
    assert isinstance(await acquire(bus, pack(salted)), Refused)
    assert isinstance(await acquire(bus, b""), Refused)
    mixed = await granted(bus, pack([CHAINS[OWNER][0], *salted, CHAINS[OWNER][1]]))
    assert len(unpack_u32(mixed.slots)) == 1, "up to the first that is not here, and no further"
    assert pinned(cluster) == 1


async def test_a_lease_opens_only_the_slots_of_what_was_named(cluster: Cluster) -> None:
    bus = await cluster.bus("node-2")
    named = pack(CHAINS[OWNER][:2])
    assert len(unpack_u32((await granted(bus, named)).slots)) == count(named)


async def test_only_the_token_itself_ends_a_lease_and_only_at_its_owner(cluster: Cluster) -> None:
    bus = await cluster.bus("node-2")
    lease = (await granted(bus, CHAINS[OWNER][0])).lease
    other = "f" * 32
    elsewhere = [
        SCOPE.of("node-2", "release"),
        Scope(SCOPE.namespace, "fedcba9876543210").of(OWNER, "release"),
    ]
    for subject in elsewhere:
        await bus.publish(subject, encode(Release(lease=lease)))
    for guess in (other, lease[:-1] + ("0" if lease[-1] != "0" else "1"), lease.upper() + "0"):
        await bus.publish(SCOPE.of(OWNER, "release"), encode(Release(lease=guess)))
    await acquire(bus, b"0" * 16)
    assert pinned(cluster) == 1
    await bus.publish(SCOPE.of(OWNER, "release"), encode(Release(lease=lease)))
    await eventually(lambda: pinned(cluster) == 0)
    await bus.publish(SCOPE.of(OWNER, "release"), encode(Release(lease=lease)))
    await granted(bus, CHAINS[OWNER][0])
    assert pinned(cluster) == 1


async def test_who_asks_for_leases_without_end_is_refused_and_takes_no_more_slots(
    cluster: Cluster,
) -> None:
    bus = await cluster.bus("node-2")
    before = pinned(cluster)
    refusal: LeaseAnswer = await granted(bus, pack(CHAINS[OWNER]))
    for _ in range(5000):
        refusal = await acquire(bus, CHAINS[OWNER][0])
        if isinstance(refusal, Refused):
            break
    assert isinstance(refusal, Refused)
    assert pinned(cluster) - before == len(CHAINS[OWNER])
