"""Small tables that could grow with what others do, at their bounds."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from kvbm_schemas.message import MAX_BATCH_BLOCKS
from kvbm_schemas.records import RankRecord, SlabRecord
from kvbm_schemas.requests import SnapshotChunk
from kvbm_schemas.subjects import Scope
from kvbm_service import own_ranks
from kvbm_service.adapters import mailbox, nats_server
from kvbm_service.adapters.memory_bus import Hub, MemoryBus
from kvbm_service.adapters.memory_directory import MemoryDirectory, Records
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_server import EmbeddedNats
from kvbm_service.cli import watch
from kvbm_service.core import block_index, holder_sets, roster, snapshot
from kvbm_service.core.roster import Roster
from kvbm_service.leader_service import LeaderService
from kvbm_service.network import Network
from kvbm_service.settings import Settings


def rank_record(agent: str, rank: int = 0, world_size: int = 1) -> RankRecord:
    slab = SlabRecord(base=0, headers=0, slots=8, slot_bytes=64, header_bytes=32)
    return RankRecord(
        node="node", rank=rank, world_size=world_size, agent=agent, agent_metadata=b"", slab=slab
    )


def test_the_largest_snapshot_fits_into_what_may_be_sent_and_taken() -> None:
    chunks = block_index.MAX_BLOCKS_PER_NODE // snapshot.CHUNK_BLOCKS
    assert chunks <= mailbox.MAX_WAITING_ANSWERS
    assert snapshot.CHUNK_BLOCKS <= MAX_BATCH_BLOCKS
    assert "total" in SnapshotChunk.__struct_fields__


def test_every_node_of_an_index_has_a_number_for_each_of_its_tiers() -> None:
    assert (block_index.MAX_NODES + 1) << block_index._TIER_BITS == holder_sets.MAX_HOLDERS


def test_so_many_former_processes_of_ranks_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roster, "MAX_FORMER", 2)
    ranks = Roster(world_size=1)
    for number in range(6):
        ranks.report(rank_record(f"agent {number}"))
    assert list(ranks._former) == ["agent 3", "agent 4"]


def test_so_many_processes_that_do_not_belong_here_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(own_ranks, "MAX_WARNED", 2)

    async def connect() -> Network:
        return Network(MemoryBus(Hub()), MemoryDirectory(Records(1.0)))

    leader = LeaderService(Settings(), Scope("a", "b"), "node", 1, connect)
    leader.start()
    ranks = own_ranks.OwnRanks(leader)
    for number in range(5):
        ranks._listed(rank_record(f"stranger {number}", world_size=7))
    leader.close()
    assert caplog.text.count("left out") == 2


async def test_what_a_slow_terminal_cannot_show_is_left_out_and_counted(
    nats_server: EmbeddedNats, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "MAX_WAITING", 3)

    def show_slowly(*_: object) -> str:
        time.sleep(0.2)
        return "shown"

    tap = watch._tap(Settings(nats_url=nats_server.url), "kvbm.>", set(), 4, show_slowly)
    tapping = asyncio.create_task(tap)
    bus = await NatsBus.connect(nats_server.url)
    said = ""
    while "listening" not in said:
        await asyncio.sleep(0.01)
        said += capsys.readouterr().err
    for _ in range(50):
        await bus.publish("kvbm.a.b.c.events", b"x")
    async with asyncio.timeout(30.0):
        await tapping
    await bus.close()
    assert "messages left out" in capsys.readouterr().err


def test_the_embedded_servers_log_is_cut_off_and_kept_once(tmp_path: Path) -> None:
    with EmbeddedNats(store_dir=tmp_path) as server:
        config = json.loads((server.log_path.parent / "server.json").read_text())
    assert config["logfile_size_limit"] == nats_server.MAX_LOG_BYTES
    assert config["logfile_max_num"] == nats_server.MAX_LOG_FILES


def test_a_servers_own_words_are_cut_off() -> None:
    etcd_errors = pytest.importorskip("kvbm_service.adapters.etcd_errors")
    etcd_login = pytest.importorskip("kvbm_service.adapters.etcd_login")
    login = etcd_login.parse_login("etcd://127.0.0.1:2379")
    error = etcd_errors.explain(login, login.members[0], None, "x" * 100_000)
    assert etcd_errors.MAX_DETAILS <= len(str(error)) < 2 * etcd_errors.MAX_DETAILS


def test_a_pem_file_is_read_up_to_a_limit(tmp_path: Path) -> None:
    etcd_login = pytest.importorskip("kvbm_service.adapters.etcd_login")
    file = tmp_path / "endless.pem"
    file.write_bytes(bytes(etcd_login.MAX_PEM_BYTES + 1))
    assert len(etcd_login._read("SETTING", str(file))) == etcd_login.MAX_PEM_BYTES
