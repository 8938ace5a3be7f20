"""The owner's side: what is leased to other nodes, for how long, and how much of it."""

from __future__ import annotations

import pytest

from kvbm_schemas.block import pack
from kvbm_schemas.requests import Leased, Refused
from kvbm_service.core import lease as lease_module
from kvbm_service.core.columns import unpack_u32, unpack_u64
from tests.core.builders import LEASE_SECONDS, Rig, chain


def acquire(rig: Rig, names: str, token: str = "a-token-of-sixteen", now: float = 0.0) -> Leased:
    answer = rig.leader.acquire(pack(chain(names)), token, now)
    rig.leader.check_integrity()
    assert isinstance(answer, Leased), answer
    return answer


def refused(rig: Rig, names: str, token: str = "another-token-of-sixteen") -> bool:
    answer = rig.leader.acquire(pack(chain(names)), token, 0.0)
    rig.leader.check_integrity()
    return isinstance(answer, Refused)


def test_a_lease_names_the_slots_and_fills_of_the_chains_head() -> None:
    rig = Rig(slots=8, world_size=2)
    rig.save("abc")
    answer = acquire(rig, "abx")
    slots = list(unpack_u32(answer.slots))
    assert len(slots) == 2
    assert list(unpack_u64(answer.fills)) == rig.leader.tiers.host.fills(slots)
    assert answer.agents == ("me/0/1", "me/1/1")
    assert answer.epoch == 1
    assert answer.seconds == LEASE_SECONDS


def test_blocks_that_are_not_here_are_refused() -> None:
    rig = Rig()
    rig.save("ab")
    assert refused(rig, "xab")
    assert refused(rig, "")


def test_a_block_on_its_way_is_refused() -> None:
    rig = Rig()
    rig.leader.store(chain("a"), [1])
    assert refused(rig, "a")


def test_leased_blocks_are_not_evicted() -> None:
    rig = Rig(slots=4)
    rig.save("abcd")
    acquire(rig, "ab")
    rig.leader.store(chain("wxyz"), [1, 2, 3, 4])
    assert rig.leader.tiers.host.match(chain("abcd")) == 2


def test_a_released_lease_keeps_nothing() -> None:
    rig = Rig()
    rig.save("ab")
    lease = acquire(rig, "ab").lease
    assert rig.leader.tiers.host.pinned == 2
    rig.leader.release(lease)
    rig.leader.release(lease)
    rig.leader.release("a-token-nobody-ever-had")
    assert rig.leader.tiers.host.pinned == 0
    rig.leader.check_integrity()


def test_a_lease_ends_by_itself() -> None:
    rig = Rig()
    rig.save("ab")
    acquire(rig, "ab", now=5.0)
    rig.leader.tick(now=5.0 + LEASE_SECONDS - 0.1)
    assert rig.leader.tiers.host.pinned == 2
    rig.leader.tick(now=5.0 + LEASE_SECONDS)
    assert rig.leader.tiers.host.pinned == 0


def test_a_block_may_be_leased_to_several_readers() -> None:
    rig = Rig(slots=8)
    rig.save("ab")
    first = acquire(rig, "ab", "first-token-of-16")
    second = acquire(rig, "ab", "second-token-of-16")
    assert first.slots == second.slots
    rig.leader.release(first.lease)
    assert rig.leader.tiers.host.pinned == 2
    rig.leader.release(second.lease)
    assert rig.leader.tiers.host.pinned == 0


def test_half_of_the_pool_is_never_leased() -> None:
    rig = Rig(slots=8)
    rig.save("abcdefgh")
    acquire(rig, "abcd")
    assert refused(rig, "efgh")


def test_a_long_chain_is_leased_as_far_as_there_is_room() -> None:
    rig = Rig(slots=8)
    rig.save("abcdefgh")
    assert len(unpack_u32(acquire(rig, "abcdefgh").slots)) == 4


def test_a_chain_that_everybody_reads_costs_its_slots_once() -> None:
    rig = Rig(slots=8)
    rig.save("abcd")
    for reader in range(20):
        assert len(unpack_u32(acquire(rig, "abcd", f"token-of-reader-{reader:02}").slots)) == 4
    assert rig.leader.tiers.host.pinned == 4


def test_a_table_that_is_full_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "MAX_LEASES", 1)
    rig = Rig()
    rig.save("ab")
    acquire(rig, "a")
    assert refused(rig, "b")


def test_a_snapshot_is_what_can_be_read_right_after_the_last_event() -> None:
    rig = Rig()
    rig.save("ab")
    rig.leader.store(chain("c"), [1])
    beat, _ = rig.leader.snapshot()
    assert sorted(rig.readable()) == sorted(chain("ab"))
    assert (beat.epoch, beat.seq) == (1, 1)
