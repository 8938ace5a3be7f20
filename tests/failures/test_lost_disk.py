"""A disk that is lost while the engine hears nothing else: the leader is told all the same."""

from __future__ import annotations

import os
from pathlib import Path

from kvbm_schemas.block import Tier
from kvbm_schemas.step import Fetch, Moved
from kvbm_schemas.subjects import Scope
from kvbm_service.core.columns import pack_u32, pack_u64
from kvbm_service.leader_service import LeaderService
from kvbm_service.network import over_nats
from kvbm_service.settings import Settings
from tests.contracts.disk_rank import named
from tests.failures.disk_worker import DiskWorker
from tests.patience import until

NOWHERE = Settings(nats_url="nats://127.0.0.1:1")


def test_a_disk_lost_by_a_fetch_for_another_node_reaches_the_leader_without_other_news(
    tmp_path: Path,
) -> None:
    worker = DiskWorker(tmp_path)
    leader = LeaderService(NOWHERE, Scope("failures", "f00d"), "node", 1, over_nats(NOWHERE, "l"))
    leader.start()
    leader.attach(worker.service.record)
    assert has_disk(leader)
    op = worker.save([0, 1], [0, 1])
    worker.until(lambda: op in worker.moved)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, worker.rank.fd, inheritable=False)
    os.close(nowhere)

    told: list[Moved] = []
    fetch = Fetch(
        op=op + 1, hashes=named([0]).tobytes(), fills=pack_u64([op]),
        disk=pack_u32([0]), host=pack_u32([5]),
    )  # fmt: skip
    worker.service.carry_out_now(fetch, told.append)
    until(lambda: told, "whoever asked is answered")
    results = worker.service.collect()
    assert results is not None
    assert (results.moved, results.loads) == ((), ())
    leader.report([results])
    assert not has_disk(leader)
    assert worker.service.collect() is None, "it is said once"
    leader.close()
    worker.close()


def has_disk(leader: LeaderService) -> bool:
    return leader.on_core(lambda core: core.tiers.has(Tier.DISK), False)
