"""A node's leader in a process of its own, which has found three blocks of an earlier life.

    python tests/contracts/etcd_node.py SETTINGS    the fields of `Settings`, as JSON

Prints a line once it runs, and ends only by a signal.
"""

from __future__ import annotations

import json
import signal
import sys

from kvbm_schemas.block import BlockHash, Tier, pack
from kvbm_schemas.records import RankRecord, SlabRecord
from kvbm_schemas.step import Survivors
from kvbm_schemas.subjects import Scope
from kvbm_service.core.columns import pack_u32, pack_u64
from kvbm_service.leader_service import LeaderService
from kvbm_service.network import over_nats
from kvbm_service.settings import Settings

SCOPE = Scope("default", "0123456789abcdef")
NODE = "node"
CHAIN = [BlockHash(bytes([number]) * 16) for number in range(1, 4)]


def main() -> None:
    settings = Settings(**json.loads(sys.argv[1]))
    connect = over_nats(settings, "leader", NODE)
    leader = LeaderService(settings, SCOPE, NODE, 1, connect, instance="this")
    leader.start()
    slab = SlabRecord(base=0, headers=0, slots=8, slot_bytes=64, header_bytes=32)
    rank = RankRecord(
        node=NODE,
        rank=0,
        world_size=1,
        agent="this/0",
        agent_metadata=b"",
        slab=slab,
        device_blocks=8,
        instance="this",
        disk_slots=0,
    )
    held = Survivors(
        tier=Tier.HOST, hashes=pack(CHAIN), fills=pack_u64(range(1, 4)), slots=pack_u32(range(3))
    )
    leader.attach(rank, [held])
    print("running", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
