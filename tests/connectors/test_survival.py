"""What an engine leaves behind in host and disk, and what the next one makes of it."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm.config import ModelConfig

from kvbm_schemas.block import Tier
from kvbm_service.adapters.disk_index import ENTRY, HEADER_BYTES
from tests.connectors.engine import Engine, Shape, prompt
from tests.connectors.lives import Lives
from tests.connectors.stand_in import make_model

KILLS = 20
HOST, DISK = "KVBM_HOST_CACHE_DIR", "DYN_KVBM_DISK_CACHE_DIR"
DISK_BLOCKS = "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS"


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory on a file system in memory."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("this machine has no /dev/shm")
    with tempfile.TemporaryDirectory(prefix="kvbm-tests-", dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def kept(memory: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of engines that leave all their blocks in two directories."""
    return {
        HOST: str(memory),
        DISK: str(tmp_path / "disk"),
        DISK_BLOCKS: 64,
        "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "true",
    }


MakeLife = Callable[..., AbstractContextManager[Engine]]


@pytest.fixture
def life(model: ModelConfig, kept: dict[str, Any]) -> MakeLife:
    """An engine's life in these directories, from its start to its end in good order."""

    @contextlib.contextmanager
    def life(model: ModelConfig = model, **shape: Any) -> Iterator[Engine]:
        engine = Engine(model, Shape(extra=kept | shape.pop("extra", {}), **shape))
        try:
            yield engine
            engine.check_nothing_is_left()
        finally:
            engine.shutdown()

    return life


def held(engine: Engine) -> tuple[int, int]:
    """How many blocks are in host and disk."""
    tiers = engine.core.tiers
    return len(tiers.host), len(tiers.disk) if tiers.disk is not None else 0


def the_file(folder: Path, name: str) -> Path:
    """The only file of that name there."""
    (found,) = folder.rglob(name)
    return found


# -- what is found again -----------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_next_engine_has_all_blocks_before_its_first_request(
    life: MakeLife, ranks: int
) -> None:
    with life(ranks=ranks) as engine:
        engine.ask(prompt(41))
        assert held(engine) == (10, 10)
        names = set(engine.core.tiers.host.blocks())
    with life(ranks=ranks) as engine:
        assert held(engine) == (10, 10)
        assert set(engine.core.tiers.host.blocks()) == names
        asked = engine.ask(prompt(41))
        assert (asked.loaded, asked.computed) == (40, 1)
        assert [rank.gate.loads.blocks for rank in engine.ranks] == [10] * ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_only_the_disk_has_is_loaded_from_there(
    life: MakeLife, memory: Path, ranks: int
) -> None:
    with life(ranks=ranks) as engine:
        engine.ask(prompt(41))
    for slab in memory.rglob("rank-*.slab"):
        slab.unlink()  # the machine was started anew
    with life(ranks=ranks) as engine:
        assert held(engine) == (0, 10)
        asked = engine.ask(prompt(41))
        assert (asked.loaded, asked.computed) == (40, 1)
        assert [rank.disk_gate.loads.blocks for rank in engine.ranks] == [10] * ranks


def test_three_lives_add_up(life: MakeLife) -> None:
    for seed in range(3):
        with life() as engine:
            assert held(engine) == (10 * seed, 10 * seed)
            engine.ask(prompt(41, seed))
    with life() as engine:
        for seed in range(3):
            assert engine.ask(prompt(41, seed)).loaded == 40


def test_what_is_stored_after_a_restart_is_newer_than_what_was_found(life: MakeLife) -> None:
    with life(slots=10) as engine:
        engine.ask(prompt(41, 0))
    with life(slots=10) as engine:
        found = set(stamps(engine))
        engine.ask(prompt(41, 1))  # into the same slots
        assert min(set(stamps(engine)) - found) > max(found)
    with life(slots=10) as engine:
        assert held(engine) == (10, 20)
        assert engine.ask(prompt(41, 1)).loaded == 40
        assert engine.ask(prompt(41, 0)).loaded == 40


def stamps(engine: Engine) -> list[int]:
    """The fill stamps of all blocks on the disk."""
    disk = engine.core.tiers.disk
    assert disk is not None
    slots = disk.pin(disk.blocks())
    disk.unpin(slots)
    return disk.fills(slots)


# -- what is not -------------------------------------------------------------------------------


def test_blocks_that_one_rank_has_lost_are_dropped_by_all(
    life: MakeLife, memory: Path, tmp_path: Path
) -> None:
    with life(ranks=2) as engine:
        engine.ask(prompt(41))
    the_file(memory, "rank-1.slab").unlink()
    the_file(tmp_path, "rank-0.index").unlink()
    with life(ranks=2) as engine:
        assert held(engine) == (0, 0)
        assert engine.ask(prompt(41)).computed == 41
        assert held(engine) == (10, 10)


def test_a_torn_entry_of_one_rank_costs_that_block_only(
    life: MakeLife, memory: Path, tmp_path: Path
) -> None:
    with life(ranks=2) as engine:
        engine.ask(prompt(41))
    the_file(memory, "rank-0.slab").unlink()
    index = np.memmap(the_file(tmp_path, "rank-1.index"), np.uint8, mode="r+")
    entries = index[HEADER_BYTES:].view(ENTRY)
    torn = int(np.flatnonzero(entries["fill"])[4])
    entries["checksum"][torn] ^= np.uint64(1 << 40)
    index.flush()
    with life(ranks=2) as engine:
        assert held(engine) == (0, 9)
        asked = engine.ask(prompt(41))
        assert asked.loaded + asked.computed == 41
        assert 0 < asked.loaded < 40


def test_a_slot_of_one_rank_that_was_being_written_is_dropped_by_all(
    life: MakeLife, memory: Path
) -> None:
    with life(ranks=2, extra={DISK_BLOCKS: 0}) as engine:
        engine.ask(prompt(41))
        slots = engine.core.tiers.host.pin(engine.core.tiers.host.blocks())
        engine.core.tiers.host.unpin(slots)
        engine.ranks[1].slab.headers["fill"][slots[5:6]] = 0
    with life(ranks=2, extra={DISK_BLOCKS: 0}) as engine:
        assert held(engine) == (9, 0)
        assert engine.ask(prompt(41)).loaded < 40


def test_bits_that_have_turned_on_the_disk_cost_a_computation(
    life: MakeLife, memory: Path, tmp_path: Path
) -> None:
    with life() as engine:
        engine.ask(prompt(41))
    the_file(memory, "rank-0.slab").unlink()
    blocks = np.memmap(the_file(tmp_path, "rank-0.blocks"), np.uint8, mode="r+")
    (written,) = np.nonzero(blocks)
    blocks[written[len(written) // 2]] ^= 1
    blocks.flush()
    with life() as engine:
        assert held(engine) == (0, 10)
        asked = engine.ask(prompt(41))
        assert 1 < asked.computed < 41
        assert engine.ranks[0].disk.mismatches == 1


@pytest.mark.parametrize(
    "changed",
    [{"slots": 32, "extra": {DISK_BLOCKS: 32}}, {"ranks": 2}, {"extra": {"KVBM_NAMESPACE": "two"}}],
    ids=["size", "ranks", "namespace"],
)
def test_another_engine_starts_empty(life: MakeLife, changed: dict[str, Any]) -> None:
    with life() as engine:
        engine.ask(prompt(41))
    with life(**changed) as engine:
        assert held(engine) == (0, 0)
        assert engine.ask(prompt(41)).computed == 41


def test_another_model_starts_empty_and_leaves_the_first_ones_blocks_alone(
    life: MakeLife, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", rope_theta=1234.0)
    with life() as engine:
        engine.ask(prompt(41))
    with life(model=other) as engine:
        assert held(engine) == (0, 0)
        assert engine.ask(prompt(41)).computed == 41
    with life() as engine:
        assert engine.ask(prompt(41)).loaded == 40


def test_after_a_reset_no_later_life_finds_anything(life: MakeLife) -> None:
    with life(ranks=2) as engine:
        engine.ask(prompt(41))
        assert engine.scheduler.reset_prefix_cache(reset_connector=True)
        assert held(engine) == (0, 0)
        engine.run()
        assert engine.ask(prompt(41)).computed == 41
        assert engine.ask(prompt(45)).computed > 0
    with life(ranks=2) as engine:
        assert held(engine) == (0, 0)
        engine.ask(prompt(41))
    with life(ranks=2) as engine:
        assert held(engine) == (10, 10)


@pytest.mark.parametrize("ranks", [1, 2])
def test_after_a_reset_that_no_step_follows_no_later_life_finds_anything_either(
    life: MakeLife, model: ModelConfig, kept: dict[str, Any], ranks: int
) -> None:
    engine = Engine(model, Shape(extra=kept, ranks=ranks))
    engine.ask(prompt(41))
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    engine.shutdown()
    with life(ranks=ranks) as engine:
        assert held(engine) == (0, 0)


# -- where it is -------------------------------------------------------------------------------


def test_two_engines_in_the_same_directories_do_not_touch_each_other(
    life: MakeLife, memory: Path, tmp_path: Path
) -> None:
    with life() as one, life() as two:
        for engine, seed in ((one, 0), (two, 1), (one, 2), (two, 3)):
            engine.ask(prompt(41, seed))
        for engine, seed in ((one, 0), (two, 1), (one, 2), (two, 3)):
            engine.forget_device()
            assert engine.ask(prompt(41, seed)).loaded == 40
        assert held(one) == held(two) == (20, 20)
    for folder in (memory, tmp_path):
        homes = {path.parent.name for path in folder.rglob("rank-0.*")}
        assert homes == {"0", "1"}
    with life() as engine:
        assert engine.ask(prompt(41, 0)).loaded == 40
        assert engine.ask(prompt(41, 1)).loaded == 0


def test_a_host_tier_that_no_file_system_in_memory_has_is_private_with_one_warning(
    life: MakeLife, tmp_path: Path, caplog: pytest.LogCaptureFixture, hear_us: None
) -> None:
    elsewhere = {HOST: str(tmp_path / "host"), DISK_BLOCKS: 0}
    with life(extra=elsewhere) as engine:
        engine.ask(prompt(41))
        engine.forget_device()
        assert engine.ask(prompt(41)).loaded == 40
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert sum("will not survive" in record.message for record in warnings) == 1
    with life(extra=elsewhere) as engine:
        assert held(engine) == (0, 0)


@pytest.fixture
def tiny_memory(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory with room for nothing, as some containers have."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_file_system_in_memory_that_is_too_small_costs_one_warning(
    life: MakeLife, tiny_memory: Path, caplog: pytest.LogCaptureFixture, hear_us: None
) -> None:
    with life(extra={HOST: str(tiny_memory)}) as engine:
        engine.ask(prompt(41))
        engine.forget_device()
        assert engine.ask(prompt(41)).loaded == 40
    (warning,) = [record.message for record in caplog.records if "survive" in record.message]
    assert "KVBM_HOST_CACHE_DIR" in warning
    with life(extra={HOST: str(tiny_memory)}) as engine:
        assert held(engine) == (0, 10)


# -- killed ------------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.timeout(300)
def test_an_engine_killed_at_any_moment_leaves_right_blocks_only(
    kept: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"slots": 48, "blocks": 40, "ranks": 2, "extra": kept}
    found = {str(Tier.HOST): 0, str(Tier.DISK): 0}
    with Lives(tmp_path / "model") as lives:
        for kill in range(KILLS):
            life = lives.begin("save_for_ever", settings, seed=kill)
            for tier, blocks in life.hear().items():
                found[tier] += blocks
            if kill % 4 == 0:
                assert life.hear()["full"]
            time.sleep(kill % 10 * 0.017)
            life.kill()
        life = lives.begin("tell", settings)
        last = life.hear()
        life.wait()
    assert last["loaded"] > 0
    assert found[str(Tier.HOST)] > 10 * KILLS
    assert found[str(Tier.DISK)] > 10 * KILLS
