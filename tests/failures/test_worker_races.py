"""What reaches a rank's lanes in an unlucky order changes nothing that it must not change."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbm_schemas.records import RankRecord
from kvbm_schemas.step import Fetch, Load, Moved, RemoteRead, StepCommands
from kvbm_service import worker_service
from kvbm_service.adapters.memcpy_mover import MemcpyMover
from kvbm_service.core.columns import pack_u32, pack_u64
from kvbm_service.lanes import Job
from kvbm_service.once import Once, Tell
from kvbm_service.worker_service import WorkerService
from tests.contracts.disk_rank import named
from tests.contracts.mover_rank import Rank, blocks
from tests.failures.disk_worker import DiskWorker
from tests.patience import until

FENCE = 1_000


def record_of(rank: Rank) -> RankRecord:
    mover = rank.mover
    return RankRecord(
        node="node", rank=0, world_size=1, agent=mover.agent, agent_metadata=b"",
        slab=rank.slab.record(),
    )  # fmt: skip


class Reader:
    """A rank that reads from another one, both in this process."""

    def __init__(self) -> None:
        self.owner, self.rank = Rank(MemcpyMover), Rank(MemcpyMover)
        self.owner.fill_pool(seed=1)
        self.owner.mover.save(blocks([4], [4]))
        self.service = WorkerService(record_of(self.rank), self.rank.mover)
        self.failed: dict[str, bytes] = {}

    def load(self, request: str) -> Load:
        wanted = blocks([4], [0])
        read = RemoteRead(
            node="owner", agents=(self.owner.mover.agent,), seconds=30.0,
            hashes=wanted.hashes.tobytes(), fills=pack_u64(wanted.fills.tolist()),
            slots=pack_u32([4]), blocks=pack_u32([0]),
        )  # fmt: skip
        return Load(op=1, request=request, remote=(read,))

    def outcome(self, request: str) -> bytes:
        """The blocks that did not arrive."""

        def told() -> bool:
            results = self.service.collect()
            for load in results.loads if results is not None else ():
                self.failed[load.request] = load.failed_blocks
            return request in self.failed

        until(told)
        return self.failed[request]


@pytest.fixture
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.service.close()


def test_a_peer_that_went_and_came_can_be_read_though_a_read_was_waiting_meanwhile(
    reader: Reader,
) -> None:
    peer = record_of(reader.owner)
    reader.service.submit(StepCommands(peers=(peer,), loads=(reader.load("before"),)))
    assert reader.outcome("before") == b""
    go_on = threading.Event()
    reader.service._reads.add(Job(lambda: go_on.wait() and None, lambda _: None))
    reader.service.submit(StepCommands(loads=(reader.load("waiting"),)))
    reader.service.submit(StepCommands(gone=(peer.agent,), peers=(peer,)))
    go_on.set()
    assert reader.outcome("waiting") == b""
    reader.service.submit(StepCommands(loads=(reader.load("after"),)))
    assert reader.outcome("after") == b""


def test_a_fetch_that_came_before_a_fence_does_not_begin_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slots are in use for something else once the fence has been answered."""
    at_it, go_on = threading.Event(), threading.Event()

    class Slow(Once):
        def begin(self, op: int, tell: Tell, blocks: int) -> bool:
            at_it.set()
            go_on.wait(1.0)
            return super().begin(op, tell, blocks)

    monkeypatch.setattr(worker_service, "Once", Slow)
    worker = DiskWorker(tmp_path)
    op = worker.save([0], [0])
    worker.until(lambda: op in worker.moved)
    fetch = Fetch(
        op=op + 1, hashes=named([0]).tobytes(), fills=pack_u64([op]),
        disk=pack_u32([0]), host=pack_u32([5]),
    )  # fmt: skip
    told: list[Moved] = []
    order: list[str] = []
    bus = threading.Thread(target=worker.service.carry_out_now, args=(fetch, told.append))
    bus.start()
    assert at_it.wait(10.0)
    worker.service.submit(StepCommands(fence=FENCE))

    def answered() -> bool:
        if told and "fetched" not in order:
            order.append("fetched")
        if FENCE in worker.moved and "fence" not in order:
            order.append("fence")
        return len(order) == 2

    try:
        worker.until(answered)
    finally:
        go_on.set()
        bus.join()
        worker.close()
    assert order == ["fetched", "fence"]
