"""A rank that lends device blocks, from the leader's commands to another rank's engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kvbm_schemas.block import Tier
from kvbm_schemas.records import DeviceRecord, RankRecord
from kvbm_schemas.step import (
    Lend,
    Load,
    LoadResult,
    Moved,
    RemoteRead,
    Save,
    StepCommands,
    Unlend,
)
from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.memcpy_mover import MemcpyMover
from kvbm_service.core.columns import pack_u32, pack_u64
from kvbm_service.errors import TransferError
from kvbm_service.host_worker import start_worker
from kvbm_service.lanes import Job
from kvbm_service.network import over_nats
from kvbm_service.settings import Settings
from kvbm_service.worker_service import RankId, WorkerService
from tests.contracts.mover_rank import POOL, Rank, blocks
from tests.patience import until


class Worker:
    """One rank with its worker, in this process, and what it has reported."""

    def __init__(self, number: int = 0, ranks: int = 1) -> None:
        self.rank = Rank(MemcpyMover)
        mover = self.rank.mover
        assert mover.pool is not None
        self.record = RankRecord(
            node="node", rank=number, world_size=ranks, agent=mover.agent, agent_metadata=b"",
            slab=self.rank.slab.record(), device=DeviceRecord(**mover.pool._asdict()),
        )  # fmt: skip
        self.service = WorkerService(self.record, mover)
        self.moved: dict[int, Moved] = {}
        self.loads: dict[int, LoadResult] = {}

    def submit(self, **commands: Any) -> None:
        self.service.submit(StepCommands(**commands))

    def step(self) -> None:
        """What an engine does that has nothing else to do."""
        results = self.service.collect()
        if results is not None:
            self.moved |= {moved.op: moved for moved in results.moved}
            self.loads |= {load.op: load for load in results.loads}

    def answer(self, op: int) -> Moved:
        """What it says of this op, once it does."""
        until(lambda: (self.step(), op in self.moved)[-1])
        return self.moved[op]

    def arrived(self, op: int, lenders: Worker | list[Worker], block: int, fill: int) -> bool:
        """Whether block 0 is, in the end, loaded from that block of the lender of our rank."""
        ranks = [lenders] if isinstance(lenders, Worker) else lenders
        wanted = blocks([block], [0])
        read = RemoteRead(
            node="owner", agents=tuple(rank.record.agent for rank in ranks), seconds=30.0,
            tier=Tier.DEVICE, hashes=wanted.hashes.tobytes(), fills=pack_u64([fill]),
            slots=pack_u32([block]), blocks=pack_u32([0]),
        )  # fmt: skip
        self.submit(loads=(Load(op=op, request="r", remote=(read,)),))
        until(lambda: (self.step(), op in self.loads)[-1])
        return self.loads[op].failed_blocks == b""

    def hold(self) -> threading.Event:
        """Let the copies wait until this is set."""
        go_on = threading.Event()
        self.service._copies.add(Job(lambda: go_on.wait(30.0) and None, lambda _: None))
        return go_on


def lend(op: int, *numbers: int) -> Lend:
    return Lend(op=op, hashes=names(*numbers), blocks=pack_u32(numbers))


def unlend(op: int, *numbers: int) -> Unlend:
    return Unlend(op=op, blocks=pack_u32(numbers))


def names(*numbers: int) -> bytes:
    return blocks(list(numbers), list(numbers)).hashes.tobytes()


@pytest.fixture
def lender() -> Iterator[Worker]:
    worker = Worker()
    worker.rank.fill_pool(seed=1)
    yield worker
    worker.service.close()


@pytest.fixture
def reader(lender: Worker) -> Iterator[Worker]:
    worker = Worker()
    worker.submit(peers=(lender.record,))
    yield worker
    worker.service.close()


def test_a_block_is_read_while_it_is_lent_and_not_before_and_not_after(
    lender: Worker, reader: Worker
) -> None:
    assert not reader.arrived(1, lender, 4, fill=7)
    lender.submit(lends=(lend(7, 4, 5),))
    assert lender.answer(7).failed == b""
    assert reader.arrived(2, lender, 4, fill=7)
    assert reader.rank.block(0) == lender.rank.block(4)
    assert not reader.arrived(3, lender, 4, fill=8)
    lender.submit(unlends=(unlend(8, 4),))
    assert lender.answer(8).failed == b""
    assert not reader.arrived(4, lender, 4, fill=7)
    assert reader.arrived(5, lender, 5, fill=7)


def test_a_rank_that_came_after_a_lender_knows_nothing_of_what_was_lent(
    lender: Worker, reader: Worker
) -> None:
    lender.submit(lends=(lend(7, 4),))
    assert lender.answer(7).failed == b""
    heir = Worker()
    reader.submit(gone=(lender.record.agent,), peers=(heir.record,))
    assert not reader.arrived(2, heir, 4, fill=7)
    assert not reader.arrived(3, lender, 4, fill=7), "it has gone"
    heir.service.close()


def test_each_rank_reads_from_the_lender_of_its_own_rank_and_proves_that_alone() -> None:
    lenders, readers = ([Worker(number, ranks=2) for number in range(2)] for _ in range(2))
    for number, lender in enumerate(lenders):
        lender.rank.write(4, number + 1)
    for reader in readers:
        reader.submit(peers=tuple(lender.record for lender in lenders))
    lenders[1].submit(lends=(lend(7, 4),))
    assert lenders[1].answer(7).failed == b""
    assert [reader.arrived(2, lenders, 4, fill=7) for reader in readers] == [False, True]
    lenders[0].submit(lends=(lend(7, 4),))
    assert lenders[0].answer(7).failed == b""
    assert [reader.arrived(3, lenders, 4, fill=7) for reader in readers] == [True, True]
    assert [set(reader.rank.block(0)) for reader in readers] == [{1}, {2}]
    for worker in (*lenders, *readers):
        worker.service.close()


def test_lending_and_taking_back_are_in_order_and_do_not_wait_for_saves(lender: Worker) -> None:
    go_on = lender.hold()
    save = Save(op=1, hashes=names(0), blocks=pack_u32([0]), slots=pack_u32([0]))
    lender.submit(saves=(save,), lends=(lend(2, 4, 5),))
    lender.submit(unlends=(unlend(3, 4),), lends=(lend(4, 6),))
    lender.answer(4)
    assert list(lender.moved) == [2, 3, 4]
    go_on.set()
    lender.answer(1)
    assert lent(lender) == {5: 2, 6: 4}


def lent(worker: Worker) -> dict[int, int]:
    """What is lent now, and by which op."""
    fills = worker.rank.mover._tier.lent.read_headers(np.arange(POOL))["fill"]
    return {number: int(fill) for number, fill in enumerate(fills) if fill}


def test_a_fence_takes_back_all_that_was_lent_before_it_and_voids_what_comes_late(
    lender: Worker, reader: Worker
) -> None:
    lender.submit(lends=(lend(7, 4, 5),))
    go_on = lender.hold()
    lender.submit(lends=(lend(8, 6),))
    lender.submit(fence=9)
    lender.submit(lends=(lend(10, 5),))
    go_on.set()
    lender.answer(9)
    lender.answer(10)
    assert lent(lender) == {5: 10}
    lender.submit(lends=(lend(8, 6), lend(11, 6)), unlends=(unlend(9, 5),))
    lender.answer(11)
    assert lent(lender) == {5: 10, 6: 11}
    assert not reader.arrived(12, lender, 4, fill=7)
    assert lender.moved[8].failed == b"", "what came late was not begun, nor answered"


def test_commands_that_come_twice_or_late_undo_nothing_that_came_after_them() -> None:
    rank = Rank(MemcpyMover)
    table = rank.mover._tier.lent

    def fill() -> int:
        return int(table.read_headers(np.array([4]))["fill"][0])

    rank.lend([4], op=2)
    rank.lend([4], op=2)
    assert fill() == 2
    rank.unlend([4], op=3)
    rank.unlend([4], op=3)
    with pytest.raises(TransferError, match="later command"):
        rank.lend([3, 4], op=2)
    assert fill() == 0
    assert not table.read_headers(np.array([3]))["fill"].any(), "half of it was lent"
    rank.lend([4], op=4)
    rank.unlend([4], op=3)
    rank.mover.unlend_all(3)
    assert fill() == 4
    rank.mover.unlend_all(4)
    assert fill() == 0
    rank.close()


def test_what_cannot_be_lent_is_answered_as_failed_and_none_of_it_is_lent(lender: Worker) -> None:
    lender.submit(lends=(lend(7, 4, POOL),))
    answer = lender.answer(7)
    assert answer.failed == pack_u32([0, 1])
    assert "device block" in answer.reason
    assert lent(lender) == {}


@pytest.mark.parametrize("lends", [True, False])
def test_a_rank_says_where_its_device_pool_lies_unless_it_is_not_to_lend(lends: bool) -> None:
    settings = Settings(
        cpu_cache_override_num_blocks=4, host_cache_dir="", nats_url="nats://127.0.0.1:1",
        lend_device=lends,
    )  # fmt: skip
    caches = {"a": torch.zeros(2, 8, 64), "b": torch.zeros(2, 8, 64)}
    rank = RankId(Scope("lending", "test"), "node", 0, 1, "life")
    worker = start_worker(settings, rank, caches, 8, over_nats(settings, "rank"))
    where = worker.record.device
    if lends:
        assert where is not None
        assert (where.blocks, where.device) == (8, None)
        halves = [half for cache in caches.values() for half in cache]
        assert where.regions == tuple((half.data_ptr(), 256) for half in halves)
        assert worker.record.slab.parts == (256,) * len(where.regions)
    else:
        assert where is None
        worker.submit(StepCommands(lends=(lend(7, 4),), unlends=(unlend(8, 5),)))
        moved: dict[int, Moved] = {}

        def told() -> bool:
            results = worker.collect()
            moved.update({one.op: one for one in results.moved} if results else {})
            return len(moved) == 2

        until(told)
        assert moved[7].failed == pack_u32([0])
        assert moved[8].failed == b""
    worker.close()
