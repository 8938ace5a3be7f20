"""A leader in a process of its own, without an engine: what it is told to store, it says it has."""

from __future__ import annotations

import logging
from typing import Any

from kvbm_schemas.block import BlockHash, Tier
from kvbm_schemas.records import RankRecord, SlabRecord
from kvbm_schemas.step import Moved, StepResults
from kvbm_schemas.subjects import Scope
from kvbm_service.leader_service import LeaderService
from kvbm_service.network import over_nats
from kvbm_service.settings import Settings
from tests.contracts.child import serve

SCOPE = Scope("default", "0123456789abcdef")


class LoneLeader:
    """Its only rank is made up."""

    def __init__(self, node: str, instance: str, settings: Any) -> None:
        chosen = Settings(**settings)
        connect = over_nats(chosen, f"leader {instance}")
        self._leader = LeaderService(chosen, SCOPE, node, 1, connect, instance=instance)
        slab = SlabRecord(base=0, headers=0, slots=64, slot_bytes=64, header_bytes=32)
        self._leader.attach(
            RankRecord(
                node=node,
                rank=0,
                world_size=1,
                agent=f"{instance}/0",
                agent_metadata=b"",
                slab=slab,
                device_blocks=64,
                instance=instance,
            )
        )
        self._leader.start()

    def store(self, names: list[str]) -> list[str]:
        """Say that these blocks are here. Returns all that are."""
        chain = [BlockHash(bytes.fromhex(name)) for name in names]
        self._leader.store("request", None, chain, list(range(len(chain))))
        moved = tuple(Moved(op=save.op) for save in self._leader.take_commands().saves)
        self._leader.report([StepResults(rank=0, moved=moved)])
        return self.held()

    def held(self) -> list[str]:
        """Every block that is here."""
        nothing: list[tuple[Tier, list[BlockHash]]] = []
        tiers = self._leader.on_core(lambda core: core.snapshot()[1], nothing)
        return [block.hex() for _, blocks in tiers for block in blocks]

    def epoch(self) -> int:
        """Of the present life."""
        return self._leader.epoch

    def leave(self) -> bool:
        """Leave the directory for good."""
        self._leader.close()
        return True


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    serve(LoneLeader)
