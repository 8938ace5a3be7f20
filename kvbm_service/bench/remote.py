"""One block from another node, end to end: the lease, the read, the proof, the report.

Two nodes in two processes, each with a real leader and a real worker, a registry in a third,
and a NATS server. The registry's answer is there before the clock starts, as it is for a
request that an engine has queued; everything after that is measured.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from kvbm_schemas.block import BlockHash
from kvbm_schemas.records import RankRecord
from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.host_tier import HostTier
from kvbm_service.adapters.mover import RemoteSlab
from kvbm_service.adapters.nixl_mover import NixlMover
from kvbm_service.bench import transfers
from kvbm_service.bench.row import Row
from kvbm_service.core.reads import Hits
from kvbm_service.demo.cluster import Cluster
from kvbm_service.leader_service import LeaderService
from kvbm_service.network import over_nats
from kvbm_service.settings import Settings
from kvbm_service.worker_service import WorkerService

SHAPE = transfers.Shape(layers=1, piece_bytes=64 << 10)
ROUNDS = 200
LOOKUP_PAUSE_SECONDS = 0.01
SPIN_SECONDS = 20e-6
"""How often an engine that has nothing else to do looks whether something has happened."""
MEET_SECONDS = 60.0

_SCOPE = Scope("bench", "bench")
_CHAIN = [BlockHash(number.to_bytes(16, "big")) for number in range(1, transfers.BATCH + 1)]


def rows() -> list[Row]:
    """`remote_pull_one_block_us`: the median of many, beside NIXL alone reading that block."""
    ours, least = [], []
    with (
        tempfile.TemporaryDirectory(prefix="kvbm-bench-") as folder,
        Cluster(Path(folder)) as cluster,
        _owner(cluster.url) as owner,
        _node("reader", cluster.url) as reader,
    ):
        reader.wait_until_readable()
        bare = reader.bare_reader(owner)
        for number in range(ROUNDS):
            block = number % len(_CHAIN)
            ours.append(reader.read(f"request-{number}", _CHAIN[block], block))
            least.append(bare(block))
    value, yardstick = statistics.median(ours) * 1e6, statistics.median(least) * 1e6
    name = "remote_pull_one_block_us"
    return [Row(name, value, "us", "NIXL alone, same block", yardstick, value / yardstick)]


class _Node:
    """A leader and a worker without an engine."""

    def __init__(self, name: str, url: str, tier: HostTier) -> None:
        settings = Settings(nats_url=url, lookup_deadline_seconds=1.0)
        self._tier = tier
        mover = NixlMover(tier)
        self.record = RankRecord(
            node=name,
            rank=0,
            world_size=1,
            agent=mover.agent,
            agent_metadata=mover.agent_metadata,
            slab=tier.slab.record(),
            device_blocks=transfers.BATCH * 2,
        )
        self._leader = LeaderService(settings, _SCOPE, name, 1, over_nats(settings, name))
        self._leader.attach(self.record)
        self._leader.start()
        self._worker = WorkerService(
            self.record, mover, scope=_SCOPE, connect=over_nats(settings, name)
        )

    def save(self, chain: list[BlockHash]) -> None:
        """Compute (nothing) and save a chain."""
        self._leader.store("", None, chain, list(range(len(chain))))
        self._settle()

    def wait_until_readable(self) -> None:
        """Read one block as soon as that is possible."""
        deadline = time.monotonic() + MEET_SECONDS
        while not self._try("meeting", _CHAIN[0]):
            assert time.monotonic() < deadline, "the nodes do not meet"
            time.sleep(0.1)

    def read(self, request: str, block: BlockHash, device_block: int) -> float:
        """Seconds from the engine's question to the block's proven arrival."""
        self._leader.arrive(request, [block])
        time.sleep(LOOKUP_PAUSE_SECONDS)
        began = time.perf_counter()
        while (found := self._leader.match(request, 0)) is None:
            time.sleep(SPIN_SECONDS)
        assert found == 1, "the block was not to be had"
        self._leader.load(request, 0, [device_block])
        self._settle()
        seconds = time.perf_counter() - began
        assert self._leader.hits(request) == Hits(remote=1)
        self._leader.finish(request)
        return seconds

    def bare_reader(self, owner: RankRecord) -> Callable[[int], float]:
        """A function that reads one block of `owner` with NIXL alone, and times that."""
        slab = owner.slab
        peer = RemoteSlab(
            owner.agent, owner.agent_metadata, slab.base, slab.headers, slab.slots,
            slab.slot_bytes, slab.parts,
        )  # fmt: skip
        bare = transfers.BareNixl(self._tier.regions, peer)

        def read(block: int) -> float:
            indices = bare.indices(transfers.one_block(block))
            began = time.perf_counter()
            bare.transfer(*indices)
            return time.perf_counter() - began

        return read

    def close(self) -> None:
        self._leader.close()
        self._worker.close()

    def _try(self, request: str, block: BlockHash) -> bool:
        self._leader.arrive(request, [block])
        while (found := self._leader.match(request, 0)) is None:
            time.sleep(SPIN_SECONDS)
        if found:
            self._leader.load(request, 0, [0])
            self._settle()
        self._leader.finish(request)
        return found == 1

    def _settle(self) -> None:
        """Step, as an idle engine does, until the ranks have reported everything."""
        commands = self._leader.take_commands()
        self._worker.submit(commands)
        while self._leader.busy:
            results = self._worker.collect()
            if results is None:
                time.sleep(SPIN_SECONDS)
            else:
                self._leader.report([results])


@contextmanager
def _node(name: str, url: str) -> Iterator[_Node]:
    with transfers.rank(SHAPE) as tier:
        node = _Node(name, url, tier)
        try:
            yield node
        finally:
            node.close()


@contextmanager
def _owner(url: str) -> Iterator[RankRecord]:
    """A node in a process of its own that holds the chain."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_own, args=(url, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield msgspec.msgpack.decode(ours.recv_bytes(), type=RankRecord)
    finally:
        ours.close()
        process.join()


def _own(url: str, parent: Connection) -> None:
    with _node("owner", url) as node:
        node.save(_CHAIN)
        parent.send_bytes(msgspec.msgpack.encode(node.record))
        parent.poll(None)  # readable when the parent closes its end
