"""A reset that cannot be written down: said in one line, and the rest is forgotten all the same."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvbm_schemas.step import StepCommands
from kvbm_schemas.subjects import Scope
from kvbm_service import forgetting
from kvbm_service.host_worker import start_worker
from kvbm_service.network import over_nats
from kvbm_service.settings import Settings
from kvbm_service.worker_service import RankId, WorkerService
from tests.contracts.file_systems import OnLoop, frozen

SCOPE = Scope("tests", "f00d")
FORGET = StepCommands(forget=True)
NOWHERE = "nats://127.0.0.1:1"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return _settings(tmp_path / "disk")


def _settings(disk: Path) -> Settings:
    return Settings(
        nats_url=NOWHERE,
        disk_cache_override_num_blocks=8,
        host_cache_dir="",
        disk_cache_dir=str(disk),
    )


@pytest.fixture
def worker(settings: Settings) -> Iterator[WorkerService]:
    yield from _worker(settings)


def _worker(settings: Settings) -> Iterator[WorkerService]:
    rank = RankId(SCOPE, "node", 0, 1, "this life")
    tensors = {"layer": torch.zeros(8, 1, 4, 256)}
    worker = start_worker(settings, rank, tensors, 8, over_nats(settings, "rank"))
    yield worker
    worker.close()


def in_the_way(path: Path) -> None:
    """Let nobody remove what is at `path`, nor put something else there."""
    path.unlink(missing_ok=True)
    path.mkdir()


def street(settings: Settings) -> Path:
    return Path(settings.disk_cache_dir) / "kvbm-tests-f00d"


def test_a_home_whose_index_cannot_be_removed_is_not_believed_all_the_same(
    worker: WorkerService, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    index = street(settings) / "0" / "rank-0.index"
    in_the_way(index)
    worker.submit(FORGET)
    assert caplog.text.count("a later engine may find blocks of before this reset") == 1
    assert f"{index} cannot be written (Is a directory)" in caplog.text
    assert (street(settings) / "generation").read_text(), "another sign that they are old"


def test_a_generation_that_cannot_be_written_keeps_no_index_from_being_removed(
    worker: WorkerService, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way(street(settings) / "generation")
    worker.submit(FORGET)
    assert caplog.text.count("a later engine may find blocks of before this reset") == 1
    assert not (street(settings) / "0" / "rank-0.index").exists()


def test_a_reset_waits_no_longer_than_its_deadline_for_a_disk_that_hangs(
    tmp_path: Path, on_loop: OnLoop, caplog: pytest.LogCaptureFixture
) -> None:
    settings = _settings(on_loop(tmp_path, 16 << 20))
    for worker in _worker(settings):
        with frozen(Path(settings.disk_cache_dir)):
            began = time.monotonic()
            worker.submit(FORGET)
            assert time.monotonic() - began < forgetting.FORGET_SECONDS + 20.0
            assert "a disk does not answer" in caplog.text


def test_a_reset_that_can_be_written_down_is_not_talked_about(
    worker: WorkerService, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "kvbm_service"):
        worker.submit(FORGET)
    assert "reset" not in caplog.text
    assert not (street(settings) / "0" / "rank-0.index").exists()
    assert (street(settings) / "generation").exists()
