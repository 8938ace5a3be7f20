"""What every mover promises: `MemcpyMover`, and `NixlMover` with the owner in another process."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from kvbm_schemas.block import Tier
from kvbm_service.adapters.memcpy_mover import MemcpyMover
from kvbm_service.adapters.mover import Blocks, Hop, Region
from kvbm_service.adapters.nixl_mover import NixlMover
from kvbm_service.adapters.nixl_reader import QUIET_SECONDS
from kvbm_service.adapters.slab import EMPTY_FILL
from kvbm_service.errors import TransferError
from tests.contracts.mover_owner import LocalOwner, OwnerProcess, octet_under
from tests.contracts.mover_rank import (
    LAYOUTS,
    MANY_PARTS,
    POOL,
    SLOTS,
    Kind,
    Rank,
    blocks,
    name,
)

SECONDS = 10.0
"""A timeout that a pull between healthy ranks never needs."""

Owner = OwnerProcess | LocalOwner

_ops = itertools.count(1000, 10)


def new_op() -> int:
    """One that no test has used before, nor the nine after it: an owner outlives a test."""
    return next(_ops)


class Hall:
    """Makes ranks and owners of one kind.

    Ranks are closed after each test, owners after the last: a process takes seconds to start.
    """

    def __init__(self, kind: Kind, stack: ExitStack, owners: Owners) -> None:
        self.kind = kind
        self._stack = stack
        self._owners = owners

    def rank(self, layout: str = "heads_first", *, verify: bool = False) -> Rank:
        rank = Rank(self.kind, layout, verify=verify)
        self._stack.callback(rank.close)
        return rank

    def owner(self, layout: str = "heads_first", *, verify: bool = False) -> Owner:
        key = (self.kind, layout, verify)
        if key not in self._owners:
            self._owners[key] = _owner(*key)
        return self._owners[key]

    def mortal_owner(self) -> Owner:
        """One that the test may close or kill."""
        owner = _owner(self.kind, "heads_first", verify=False)
        self._stack.callback(owner.close)
        return owner

    def process(self) -> OwnerProcess:
        owner = self.mortal_owner()
        assert isinstance(owner, OwnerProcess)
        return owner


def _owner(kind: Kind, layout: str, verify: bool) -> Owner:
    if kind is MemcpyMover:
        return LocalOwner(Rank(MemcpyMover, layout, verify=verify))
    return OwnerProcess(layout, verify=verify)


Owners = dict[tuple[Kind, str, bool], Owner]


@pytest.fixture(scope="module")
def owners() -> Iterator[Owners]:
    owners: Owners = {}
    yield owners
    for owner in owners.values():
        owner.close()


@pytest.fixture(params=[MemcpyMover, NixlMover])
def hall(request: pytest.FixtureRequest, owners: Owners) -> Iterator[Hall]:
    with ExitStack() as stack:
        yield Hall(request.param, stack, owners)


@pytest.fixture
def nixl(owners: Owners) -> Iterator[Hall]:
    with ExitStack() as stack:
        yield Hall(NixlMover, stack, owners)


def hop(source: list[int], target: list[int], fill: int, source_fill: int = 1) -> Hop:
    """Columns for a move of the blocks that `blocks` names after the source slots."""
    named = blocks(source, target, source_fill)
    return Hop(named.hashes, named.fills, named.slots, named.device, fill)


def fetch(rank: Rank, owner: Owner, wanted: Hop, seconds: float = SECONDS) -> list[bool]:
    return rank.mover.fetch(owner.as_peer.agent, wanted, seconds).tolist()


def load(rank: Rank, fetched: Hop, device: list[int]) -> list[bool]:
    """Load what a fetch has brought."""
    fills = np.full(len(device), fetched.fill, np.uint64)
    columns = Blocks(fetched.hashes, fills, fetched.target, np.array(device, np.uint32))
    return rank.mover.load(columns).tolist()


def empty(rank: Rank, slots: list[int]) -> list[bool]:
    return (rank.slab.headers["fill"][slots] == EMPTY_FILL).tolist()


def pull(rank: Rank, owner: Owner, wanted: Blocks, seconds: float = SECONDS) -> list[bool]:
    return rank.mover.pull(owner.as_peer.agent, wanted, seconds).tolist()


def pull_lent(rank: Rank, owner: Owner, wanted: Blocks, seconds: float = SECONDS) -> list[bool]:
    agent = owner.as_peer.agent
    return rank.mover.pull(agent, wanted, seconds, Tier.DEVICE).tolist()


# -- own slab ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_saved_block_loads_back_byte_for_byte_and_touches_no_other(
    hall: Hall, layout: str
) -> None:
    rank = hall.rank(layout)
    rank.fill_pool(seed=1)
    saved = [rank.block(number) for number in (3, 0, 23)]
    rank.mover.save(blocks([15, 2, 0], [3, 0, 23]))
    rank.fill_pool(seed=2)
    before = {number: rank.block(number) for number in range(24)}

    assert rank.mover.load(blocks([15, 2, 0], [7, 8, 1])).tolist() == [True, True, True]

    assert [rank.block(number) for number in (7, 8, 1)] == saved
    others = set(range(24)) - {7, 8, 1}
    assert all(rank.block(number) == before[number] for number in others)


def test_a_slot_that_holds_another_block_is_not_loaded_and_the_others_are(hall: Hall) -> None:
    rank = hall.rank()
    rank.fill_pool(seed=1)
    rank.mover.save(blocks([4, 5, 6], [4, 5, 6]))
    rank.stamp(5, name(9), fill=1)
    expected = [rank.block(number) for number in (4, 6)]
    rank.fill_pool(seed=0)
    untouched = rank.block(5)

    assert rank.mover.load(blocks([4, 5, 6], [4, 5, 6])).tolist() == [True, False, True]

    assert [rank.block(number) for number in (4, 6)] == expected
    assert rank.block(5) == untouched


def test_a_slot_filled_again_with_the_same_block_is_not_the_one_that_was_promised(
    hall: Hall,
) -> None:
    rank = hall.rank()
    rank.mover.save(blocks([4], [4], fill=2))
    assert rank.mover.load(blocks([4], [4], fill=1)).tolist() == [False]
    assert rank.mover.load(blocks([4], [4], fill=2)).tolist() == [True]


def test_verification_sees_a_bit_that_flipped_in_a_slot(hall: Hall) -> None:
    rank = hall.rank(verify=True)
    rank.fill_pool(seed=1)
    rank.mover.save(blocks([4, 5], [4, 5]))
    assert rank.mover.load(blocks([4, 5], [4, 5])).tolist() == [True, True]
    rank.flip_a_bit(5)
    assert rank.mover.load(blocks([4, 5], [4, 5])).tolist() == [True, False]


def test_numbers_that_do_not_exist_are_refused_before_anything_is_written(hall: Hall) -> None:
    rank, owner = hall.rank(), hall.owner()
    rank.mover.connect(owner.as_peer)
    for wrong in (blocks([SLOTS], [0]), blocks([0], [POOL])):
        with pytest.raises(TransferError):
            rank.mover.save(wrong)
        with pytest.raises(TransferError):
            rank.mover.load(wrong)
        with pytest.raises(TransferError):
            pull(rank, owner, wrong)


def test_moving_nothing_is_no_error(hall: Hall) -> None:
    rank, owner = hall.rank(), hall.owner()
    rank.mover.connect(owner.as_peer)
    rank.mover.save(blocks([], []))
    assert rank.mover.load(blocks([], [])).tolist() == []
    assert pull(rank, owner, blocks([], [])) == []


# -- another rank's slab -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pulled_block_is_the_owners_byte_for_byte_and_touches_no_other(
    hall: Hall, layout: str
) -> None:
    rank, owner = hall.rank(layout), hall.owner(layout)
    owner.save(5, [299, 2, 5], [3, 0, 23])
    rank.fill_pool(seed=2)
    before = {number: rank.block(number) for number in range(24)}
    rank.mover.connect(owner.as_peer)

    assert pull(rank, owner, blocks([299, 2, 5], [7, 8, 23])) == [True, True, True]

    assert [rank.block(number) for number in (7, 8, 23)] == [
        owner.block(number) for number in (3, 0, 23)
    ]
    others = set(range(24)) - {7, 8, 23}
    assert all(rank.block(number) == before[number] for number in others)


def test_a_slot_that_was_reused_is_refused_by_a_pull_and_the_others_arrive(hall: Hall) -> None:
    rank, owner = hall.rank(), hall.owner()
    owner.save(5, [4, 5, 6, 7], [4, 5, 6, 7])
    owner.stamp(5, name(9), fill=1)
    owner.stamp(6, name(6), fill=2)
    rank.mover.connect(owner.as_peer)
    wanted = blocks([4, 5, 6, 7], [4, 5, 6, 7])
    assert pull(rank, owner, wanted) == [True, False, False, True]
    assert rank.block(7) == owner.block(7)


def test_a_slot_reused_while_it_is_read_is_refused(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, owner = hall.rank(), hall.owner()
    owner.save(5, [4, 5], [4, 5])
    rank.mover.connect(owner.as_peer)
    read: Callable[..., None] = rank.mover._read

    def read_and_lose_the_race(*args: Any) -> None:
        read(*args)
        owner.stamp(5, name(5), fill=2)

    monkeypatch.setattr(rank.mover, "_read", read_and_lose_the_race)
    assert pull(rank, owner, blocks([4, 5], [4, 5])) == [True, False]


def test_verification_sees_a_bit_that_flipped_at_the_owner(hall: Hall) -> None:
    rank, owner = hall.rank(verify=True), hall.owner(verify=True)
    owner.save(5, [4, 5], [4, 5])
    rank.mover.connect(owner.as_peer)
    assert pull(rank, owner, blocks([4, 5], [4, 5])) == [True, True]
    owner.flip_a_bit(5)
    assert pull(rank, owner, blocks([4, 5], [4, 5])) == [True, False]


def test_a_block_saved_without_a_checksum_passes_verification(hall: Hall) -> None:
    rank, owner = hall.rank(verify=True), hall.owner(verify=False)
    owner.save(5, [4], [4])
    rank.mover.connect(owner.as_peer)
    assert pull(rank, owner, blocks([4], [4])) == [True]


def test_a_peer_with_another_layout_is_refused_in_words(hall: Hall) -> None:
    rank, owner = hall.rank("heads_first"), hall.owner("keys_and_values_apart")
    with pytest.raises(TransferError, match="same model"):
        rank.mover.connect(owner.as_peer)


def test_a_peer_must_be_connected_and_can_be_forgotten_and_met_again(hall: Hall) -> None:
    rank, owner = hall.rank(), hall.owner()
    owner.save(5, [4], [4])
    agent = owner.as_peer.agent
    with pytest.raises(TransferError, match="not connected"):
        pull(rank, owner, blocks([4], [4]))
    for _ in range(2):
        rank.mover.connect(owner.as_peer)
        rank.mover.connect(owner.as_peer)
        assert pull(rank, owner, blocks([4], [4])) == [True]
        rank.mover.forget(agent)
        rank.mover.forget(agent)
        with pytest.raises(TransferError, match="not connected"):
            pull(rank, owner, blocks([4], [4]))


def test_a_peer_that_left_cannot_be_read_and_another_can(hall: Hall) -> None:
    rank, owner, other = hall.rank(), hall.mortal_owner(), hall.owner()
    rank.mover.connect(owner.as_peer)
    rank.mover.connect(other.as_peer)
    other.save(6, [4], [4])
    owner.close()
    with pytest.raises(TransferError):
        pull(rank, owner, blocks([4], [4]))
    assert pull(rank, other, blocks([4], [4])) == [True]


# -- another rank's slab, to ours ---------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fetched_block_is_the_owners_byte_for_byte_and_touches_no_other_slot(
    hall: Hall, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbm_service.adapters.nixl_reader.BUFFER_BYTES", 1)  # a slot at a time
    rank, owner = hall.rank(layout), hall.owner(layout)
    owner.save(5, [299, 2, 5], [3, 0, 23])
    rank.slab.blocks[:] = 7
    rank.mover.connect(owner.as_peer)
    wanted = hop([299, 2, 5], [0, 298, 5], fill=9)

    assert fetch(rank, owner, wanted) == [True, True, True]

    assert load(rank, wanted, [7, 8, 1]) == [True, True, True]
    assert [rank.block(number) for number in (7, 8, 1)] == [
        owner.block(number) for number in (3, 0, 23)
    ]
    others = np.setdiff1d(np.arange(SLOTS), [0, 298, 5])
    assert (rank.slab.blocks[others] == 7).all()
    assert (rank.slab.headers["fill"][others] == EMPTY_FILL).all()


def test_a_fetched_block_goes_by_its_new_fill_stamp_alone(hall: Hall) -> None:
    rank, owner = hall.rank(), hall.owner()
    owner.save(5, [4], [4])
    rank.mover.connect(owner.as_peer)
    wanted = hop([4], [6], fill=9)
    assert fetch(rank, owner, wanted) == [True]
    assert load(rank, wanted._replace(fill=1), [0]) == [False]
    assert load(rank, wanted, [0]) == [True]


def test_a_slot_that_was_reused_is_refused_by_a_fetch_and_the_others_arrive(hall: Hall) -> None:
    rank, owner = hall.rank(), hall.owner()
    owner.save(5, [4, 5, 6, 7], [4, 5, 6, 7])
    owner.stamp(5, name(9), fill=1)
    owner.stamp(6, name(6), fill=2)
    rank.mover.save(blocks([0, 1, 2, 3], [0, 1, 2, 3]))
    rank.mover.connect(owner.as_peer)
    wanted = hop([4, 5, 6, 7], [0, 1, 2, 3], fill=9)
    assert fetch(rank, owner, wanted) == [True, False, False, True]
    assert empty(rank, [0, 1, 2, 3]) == [False, True, True, False]
    assert load(rank, wanted, [0, 1, 2, 3]) == [True, False, False, True]
    assert rank.block(3) == owner.block(7)


def test_a_slot_reused_while_it_is_fetched_is_refused(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, owner = hall.rank(), hall.owner()
    owner.save(5, [4, 5], [4, 5])
    rank.mover.save(blocks([4, 5], [4, 5]))
    rank.mover.connect(owner.as_peer)
    read: Callable[..., Any] = rank.mover._read_slots

    def read_and_lose_the_race(*args: Any) -> Any:
        assert empty(rank, [4, 5]) == [True, True]
        found = read(*args)
        owner.stamp(5, name(5), fill=2)
        return found

    monkeypatch.setattr(rank.mover, "_read_slots", read_and_lose_the_race)
    assert fetch(rank, owner, hop([4, 5], [4, 5], fill=9)) == [True, False]
    assert empty(rank, [4, 5]) == [False, True]


def test_verification_goes_along_with_a_fetched_block(hall: Hall) -> None:
    rank, owner = hall.rank(verify=True), hall.owner(verify=True)
    owner.save(5, [4, 5], [4, 5])
    rank.mover.connect(owner.as_peer)
    wanted = hop([4, 5], [6, 7], fill=9)
    assert fetch(rank, owner, wanted) == [True, True]
    assert load(rank, wanted, [4, 5]) == [True, True]
    rank.flip_a_bit(6)
    assert load(rank, wanted, [4, 5]) == [False, True]
    owner.flip_a_bit(5)
    assert fetch(rank, owner, wanted) == [True, False]


def test_slots_that_do_not_exist_are_refused_before_anything_is_fetched(hall: Hall) -> None:
    rank, owner = hall.rank(), hall.owner()
    rank.mover.save(blocks([0], [0]))
    with pytest.raises(TransferError, match="not connected"):
        fetch(rank, owner, hop([0], [0], fill=9))
    rank.mover.connect(owner.as_peer)
    uneven = hop([0], [0], fill=9)._replace(target=np.zeros(2, np.uint32))
    for wrong in (hop([SLOTS, 0], [1, 0], fill=9), hop([0, 1], [0, SLOTS], fill=9), uneven):
        with pytest.raises(TransferError):
            fetch(rank, owner, wrong)
    assert empty(rank, [0, 1]) == [False, True]
    assert fetch(rank, owner, hop([], [], fill=9)) == []


# -- another rank's device pool -----------------------------------------------------------------


@pytest.mark.parametrize("layout", [*LAYOUTS, MANY_PARTS])
def test_a_lent_block_is_pulled_byte_for_byte_and_touches_no_other(hall: Hall, layout: str) -> None:
    rank, owner = hall.rank(layout), hall.owner(layout)
    op = new_op()
    owner.fill_pool(seed=5)
    owner.lend([23, 0, 3], op)
    rank.fill_pool(seed=2)
    before = {number: rank.block(number) for number in range(POOL)}
    rank.mover.connect(owner.as_peer)

    assert pull_lent(rank, owner, blocks([3, 23, 0], [7, 8, 23], op)) == [True] * 3

    assert [rank.block(number) for number in (7, 8, 23)] == [
        owner.block(number) for number in (3, 23, 0)
    ]
    others = set(range(POOL)) - {7, 8, 23}
    assert all(rank.block(number) == before[number] for number in others)


def test_a_lent_block_comes_over_tcp_as_well(nixl: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp,self")  # the owner's own CPU serves each read
    rank, owner = nixl.rank(), nixl.process()
    owner.fill_pool(seed=5)
    owner.lend([4], op=10)
    rank.mover.connect(owner.as_peer)
    assert pull_lent(rank, owner, blocks([4, 5], [6, 7], fill=10)) == [True, False]
    assert rank.block(6) == owner.block(4)


def test_only_what_is_lent_now_under_this_name_and_op_is_believed(hall: Hall) -> None:
    rank, owner = hall.rank(), hall.owner()
    op = new_op()
    owner.fill_pool(seed=5)
    owner.lend([4, 5, 6, 7], op)
    owner.unlend([5], op + 1)
    owner.lend([6], op + 2)
    rank.mover.connect(owner.as_peer)
    assert pull_lent(rank, owner, blocks([4, 5, 6, 7, 8], [0, 1, 2, 3, 4], op)) == [
        True, False, False, True, False,
    ]  # fmt: skip
    assert pull_lent(rank, owner, blocks([6], [2], op + 2)) == [True]
    assert rank.block(2) == owner.block(6)
    otherwise_named = blocks([4], [0], op)._replace(hashes=blocks([9], [0]).hashes)
    assert pull_lent(rank, owner, otherwise_named) == [False]


def test_what_is_lent_says_nothing_of_the_slot_of_the_same_number(hall: Hall) -> None:
    rank, owner = hall.rank(), hall.owner()
    op = new_op()
    owner.save(5, [11], [0], op)
    owner.lend([12], op)
    rank.mover.connect(owner.as_peer)
    for _ in range(2):
        wanted = blocks([11, 12], [1, 2], op)
        assert pull(rank, owner, wanted) == [True, False]
        assert rank.block(1) == owner.block(0)
        assert pull_lent(rank, owner, wanted) == [False, True]
        assert rank.block(2) == owner.block(12)
        rank.mover.forget(owner.as_peer.agent)
        rank.mover.connect(owner.as_peer)


def test_a_block_taken_back_and_used_while_it_is_read_is_refused(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, owner = hall.rank(), hall.owner()
    op = new_op()
    owner.lend([4, 5], op)
    rank.mover.connect(owner.as_peer)
    read: Callable[..., None] = rank.mover._read

    def read_and_lose_the_race(*args: Any) -> None:
        owner.unlend([5], op + 1)
        owner.write(5, 99)
        read(*args)
        owner.lend([5], op + 2)

    monkeypatch.setattr(rank.mover, "_read", read_and_lose_the_race)
    assert pull_lent(rank, owner, blocks([4, 5], [4, 5], op)) == [True, False]


def test_a_block_that_is_reused_all_the_time_is_believed_only_with_the_bytes_it_had(
    nixl: Hall,
) -> None:
    """Its owner lends it, takes it back and writes to it with no regard for us."""
    rank, owner = nixl.rank(), nixl.process()
    agent, first = owner.as_peer.agent, np.array([9], np.uint32)
    rank.mover.connect(owner.as_peer)
    owner.lend([9], op=1)
    assert pull_lent(rank, owner, blocks([9], [0], fill=1)) == [True]
    owner.keep_reusing(9)
    answers = {True: 0, False: 0}
    deadline = time.monotonic() + 60
    while min(answers.values()) < 30:
        assert time.monotonic() < deadline, answers
        headers = rank.mover._reader.read_headers(agent, Tier.DEVICE, first, deadline)
        op = int(headers["fill"][0])
        if op == EMPTY_FILL or op == 1:
            continue
        believed = pull_lent(rank, owner, blocks([9], [0], fill=op)) == [True]
        answers[believed] += 1
        if believed:
            assert set(rank.block(0)) == {octet_under(op)}
        else:
            time.sleep(0.0005 * (answers[False] % 7))  # come at all moments of its round


def test_verification_sees_a_lent_block_that_was_written_to(hall: Hall) -> None:
    rank, owner = hall.rank(verify=True), hall.owner(verify=True)
    op = new_op()
    owner.fill_pool(seed=5)
    owner.lend([4, 5], op)
    rank.mover.connect(owner.as_peer)
    assert pull_lent(rank, owner, blocks([4, 5], [4, 5], op)) == [True, True]
    owner.write(5, 99)
    assert pull_lent(rank, owner, blocks([4, 5], [4, 5], op)) == [True, False]


def test_device_blocks_that_do_not_exist_are_neither_lent_nor_pulled(hall: Hall) -> None:
    rank, owner = hall.rank(), hall.owner()
    rank.mover.connect(owner.as_peer)
    with pytest.raises(TransferError):
        rank.lend([0, POOL], op=1)
    with pytest.raises(TransferError):
        rank.unlend([POOL], op=1)
    for wrong in (blocks([POOL], [0]), blocks([0], [POOL])):
        with pytest.raises(TransferError):
            pull_lent(rank, owner, wrong)
    assert pull_lent(rank, owner, blocks([], [])) == []


def test_who_does_not_lend_is_read_from_the_host_tier_only(hall: Hall) -> None:
    rank, owner = hall.rank(), hall.owner()
    owner.save(5, [4], [4])
    rank.mover.connect(owner.as_peer._replace(pool=None))
    with pytest.raises(TransferError, match="does not lend"):
        pull_lent(rank, owner, blocks([4], [4]))
    assert pull(rank, owner, blocks([4], [4])) == [True]


def test_a_pool_that_cannot_be_registered_is_not_lent_from_and_that_is_said_once(
    nixl: Hall, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def in_no_memory(regions: list[Region]) -> list[tuple[int, int]]:
        return [(0, -1) for _ in regions]

    monkeypatch.setattr("kvbm_service.adapters.nixl_mover.extents", in_no_memory)
    owner = nixl.rank()
    monkeypatch.undo()
    assert owner.as_peer.pool is None
    assert caplog.text.count("device blocks cannot be lent") == 1
    with pytest.raises(TransferError, match="cannot be read by others"):
        owner.lend([4], op=1)
    owner.unlend([4], op=2)


def test_an_owner_killed_in_the_middle_of_a_pull_of_what_it_lent_fails_it_in_time(
    nixl: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, owner, other = nixl.rank(), nixl.process(), nixl.owner()
    op = new_op()
    owner.lend([4], op)
    other.lend([4], op)
    rank.mover.connect(owner.as_peer)
    read: Callable[..., Any] = rank.mover._read

    def read_and_kill(*args: Any) -> None:
        read(*args)
        owner.kill()

    monkeypatch.setattr(rank.mover, "_read", read_and_kill)
    began = time.monotonic()
    with pytest.raises(TransferError):
        pull_lent(rank, owner, blocks([4], [4], op), seconds=1.0)
    assert time.monotonic() - began < SECONDS
    monkeypatch.undo()
    rank.mover.connect(other.as_peer)
    assert pull_lent(rank, other, blocks([4], [4], op)) == [True]
    assert rank.block(4) == other.block(4)


# -- peers that fail, in processes of their own -------------------------------------------------


def test_a_killed_peer_fails_the_pull_in_time_and_a_new_one_can_be_read(nixl: Hall) -> None:
    rank, owner = nixl.rank(), nixl.process()
    owner.save(5, [4], [4])
    rank.mover.connect(owner.as_peer)
    assert pull(rank, owner, blocks([4], [4])) == [True]
    owner.kill()

    began = time.monotonic()
    with pytest.raises(TransferError):
        pull(rank, owner, blocks([4], [4]), seconds=1.0)
    assert time.monotonic() - began < 1.0 + QUIET_SECONDS + 10.0
    with pytest.raises(TransferError):
        rank.mover.connect(owner.as_peer)

    new = nixl.process()
    new.save(6, [4], [4])
    rank.mover.connect(new.as_peer)
    assert pull(rank, new, blocks([4], [4])) == [True]
    assert rank.block(4) == new.block(4)


def test_an_owner_killed_in_the_middle_of_a_fetch_leaves_no_slot_that_is_believed(
    nixl: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbm_service.adapters.nixl_reader.BUFFER_BYTES", 1)
    rank, owner, other = nixl.rank(), nixl.process(), nixl.owner()
    owner.save(5, [4, 5, 6], [4, 5, 6])
    rank.mover.save(blocks([4, 5, 6], [4, 5, 6]))
    rank.mover.connect(owner.as_peer)
    read: Callable[..., Any] = rank.mover._read_slots

    def read_and_kill(*args: Any) -> Any:
        found = read(*args)
        owner.kill()
        return found

    monkeypatch.setattr(rank.mover, "_read_slots", read_and_kill)
    with pytest.raises(TransferError):
        fetch(rank, owner, hop([4, 5, 6], [4, 5, 6], fill=9), seconds=1.0)
    assert empty(rank, [4, 5, 6]) == [True, True, True]

    monkeypatch.undo()
    other.save(6, [4], [4])
    rank.mover.connect(other.as_peer)
    wanted = hop([4], [4], fill=10)
    assert fetch(rank, other, wanted) == [True]
    assert load(rank, wanted, [0]) == [True]
    assert rank.block(0) == other.block(4)


@pytest.mark.parametrize("transports", ["all", "tcp,self"])
def test_a_fetch_that_was_given_up_writes_nothing_late(
    nixl: Hall, monkeypatch: pytest.MonkeyPatch, transports: str
) -> None:
    monkeypatch.setenv("UCX_TLS", transports)
    monkeypatch.setattr("kvbm_service.adapters.nixl_mover.CONNECT_SECONDS", 0.2)
    rank, owner = nixl.rank(), nixl.process()
    owner.save(5, [4], [4])
    rank.slab.blocks[:] = 7
    owner.stop()
    with pytest.raises(TransferError):
        rank.mover.connect(owner.as_peer)
    with pytest.raises(TransferError):
        fetch(rank, owner, hop([4], [4], fill=9), seconds=0.2)
    owner.go_on()
    owner.save(5, [6], [6])  # the owner has come round: it answers
    monkeypatch.setattr("kvbm_service.adapters.nixl_mover.CONNECT_SECONDS", SECONDS)
    rank.mover.connect(owner.as_peer)
    wanted = hop([6], [6], fill=10)
    assert fetch(rank, owner, wanted) == [True]
    assert load(rank, wanted, [0]) == [True]
    assert rank.block(0) == owner.block(6)
    assert (rank.slab.blocks[4] == 7).all(), "a read that was given up wrote late"
    assert empty(rank, [4]) == [True]


@pytest.mark.parametrize("transports", ["all", "tcp,self"])
def test_a_peer_stopped_for_long_writes_nothing_late_and_is_read_again_afterwards(
    nixl: Hall, monkeypatch: pytest.MonkeyPatch, transports: str
) -> None:
    monkeypatch.setenv("UCX_TLS", transports)
    rank, owner = nixl.rank(), nixl.process()
    owner.save(5, [4], [4])
    owner.stop()
    with monkeypatch.context() as impatient:
        impatient.setattr("kvbm_service.adapters.nixl_mover.CONNECT_SECONDS", 0.2)
        with pytest.raises(TransferError):
            rank.mover.connect(owner.as_peer)
    with pytest.raises(TransferError):
        pull(rank, owner, blocks([4], [4]), seconds=0.2)
    rank.fill_pool(seed=0)
    empty = rank.block(4)

    owner.go_on()
    owner.save(5, [6], [6])  # the owner has come round: it answers
    monkeypatch.setattr("kvbm_service.adapters.nixl_mover.CONNECT_SECONDS", SECONDS)
    rank.mover.connect(owner.as_peer)
    assert pull(rank, owner, blocks([6], [6])) == [True]
    assert rank.block(6) == owner.block(6)
    assert rank.block(4) == empty, "a read that was given up wrote late"
    assert pull(rank, owner, blocks([4], [4])) == [True]


@pytest.mark.parametrize("transports", ["all", "tcp,self"])
def test_two_ranks_that_read_from_each_other_at_once_serve_each_other_meanwhile(
    nixl: Hall, monkeypatch: pytest.MonkeyPatch, transports: str
) -> None:
    monkeypatch.setenv("UCX_TLS", transports)
    ranks = [nixl.rank(), nixl.rank()]
    for rank in ranks:
        rank.fill_pool(seed=1)
        rank.mover.save(blocks([4], [4]))
    both_ready = threading.Barrier(2)

    def read_the_other(rank: Rank, other: Rank) -> list[bool]:
        both_ready.wait()
        rank.mover.connect(other.as_peer)
        arrived = rank.mover.pull(other.as_peer.agent, blocks([4], [5]), SECONDS).tolist()
        for _ in range(200):  # as a worker does when it has nothing else to do
            rank.mover.progress()
            time.sleep(0.001)
        return arrived

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(read_the_other, ranks, ranks[::-1])) == [[True], [True]]
    assert ranks[0].block(5) == ranks[1].block(4)


def test_a_pull_that_ends_after_its_deadline_is_thrown_away(
    nixl: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp,self")  # the owner's own CPU serves each read
    monkeypatch.setattr("kvbm_service.adapters.nixl_reader.QUIET_SECONDS", SECONDS)
    rank, owner = nixl.rank(), nixl.process()
    owner.save(5, [4], [4])
    rank.mover.connect(owner.as_peer)
    owner.stop()
    waker = threading.Timer(0.5, owner.go_on)
    waker.start()
    with pytest.raises(TransferError, match="took too long"):
        pull(rank, owner, blocks([4], [4]), seconds=0.1)
    waker.join()
    assert pull(rank, owner, blocks([4], [4])) == [True]
    assert rank.block(4) == owner.block(4)
