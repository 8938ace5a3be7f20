"""Messages of the right type with absurd values, on a real server: nobody falls over, nothing that
was promised is broken, and what they spoil heals.

A lie that bears a node's very next numbers is believed: nothing but the server can tell who sent
it, and with the permissions in deploy/nats it takes none (tests/security).
Rubbish and messages of other types: tests/wire/test_every_subject.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kvbm_schemas.block import Tier
from kvbm_schemas.codec import Decoder, encode
from kvbm_schemas.events import Beat, Cleared, Removed, Stored
from kvbm_schemas.message import MAX_U63
from kvbm_schemas.requests import Acquire, Refused, Release
from kvbm_service.adapters.nats_server import EmbeddedNats
from tests.patience import until
from tests.wire.test_every_subject import CHAIN, NODE, SCOPE, World

HEAL_SECONDS = 60.0
TOKENS = r"\A[0-9a-f]{16,64}\Z"
hashes = st.binary(min_size=16, max_size=16)
FAR_AHEAD = (1 << 31, 1 << 62)
"""By how much a lie is ahead of the node's own numbers."""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with EmbeddedNats() as server:
        world = World(server.url)
        yield world
        world.close()


def now_at(world: World) -> Beat:
    """How far the node's own events have come."""
    beat, _ = world.leader.on_core(lambda core: core.snapshot(), (None, None))
    assert beat is not None
    return beat


def knows_the_truth(world: World) -> bool:
    """Whether the registry says of the node what it holds, and no more."""
    copies = [node.copies for node in world.registry._registry.nodes()]
    holders = world.registry._registry.locate(SCOPE, b"".join(CHAIN))
    return copies == [len(CHAIN)] and all(len(who) == 1 for who in holders)


@settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_registry_that_was_told_absurd_lies_about_a_node_knows_the_truth_again(
    world: World, data: st.DataObject
) -> None:
    """The lies are of any life of the node, of what it has said already or of far ahead."""
    at = now_at(world)
    epochs = st.sampled_from([0, at.epoch - 1, at.epoch, at.epoch, at.epoch + 1, MAX_U63])
    seqs = st.sampled_from([0, at.seq, *(min(at.seq + more, MAX_U63) for more in FAR_AHEAD)])
    tiers, names = st.sampled_from(list(Tier)), st.lists(hashes, max_size=4).map(b"".join)
    for _ in range(data.draw(st.integers(1, 5))):
        place = {"epoch": data.draw(epochs), "seq": data.draw(seqs)}
        blocks = {"tier": data.draw(tiers), "hashes": data.draw(names)}
        kind = data.draw(st.sampled_from([Stored, Removed, Cleared, Beat]))
        lie = kind(**place, **(blocks if kind in (Stored, Removed) else {}))
        world.publish(SCOPE.of(NODE, "events"), encode(lie))
    counted = world.rejected()
    world.publish(SCOPE.of(NODE, "events"), b"rubbish")  # arrives after them
    until(lambda: world.rejected() == counted + 1)
    until(lambda: knows_the_truth(world), lie, HEAL_SECONDS)
    assert now_at(world).epoch == at.epoch


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(wanted=st.lists(hashes, min_size=1, max_size=64), lease=st.from_regex(TOKENS))
def test_leases_on_what_is_not_there_and_releases_of_what_was_not_given_change_nothing(
    world: World, wanted: list[bytes], lease: str
) -> None:
    until(lambda: knows_the_truth(world), "the registry has heard of the node", HEAL_SECONDS)
    before = world.state()
    world.publish(SCOPE.of(NODE, "release"), encode(Release(lease=lease)))
    acquire = encode(Acquire(hashes=b"".join(wanted)))
    answer = world._do(world.bus.request(SCOPE.of(NODE, "lease"), acquire, HEAL_SECONDS))
    assert Decoder(Refused).decode(answer).reason == "not here"
    assert world.state() == before
