"""How often a worker looks after those who read from it: it costs an engine on CPUs dear."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbm_service import worker_service
from tests.failures.disk_worker import DiskWorker
from tests.patience import until

QUITE_LONG_SECONDS = 0.3


class Looks:
    """Counts how often the worker has let others' connections make progress."""

    def __init__(self, worker: DiskWorker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        progress = worker.service._mover.progress

        def counted() -> None:
            self.count += 1
            progress()

        monkeypatch.setattr(worker.service._mover, "progress", counted)


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DiskWorker]:
    """One that looks once in a minute while nobody is expected."""
    monkeypatch.setattr(worker_service, "RESTING_SECONDS", 60.0)
    worker = DiskWorker(tmp_path)
    time.sleep(QUITE_LONG_SECONDS)
    yield worker
    worker.close()


def test_a_worker_looks_after_readers_at_once_when_it_hears_of_them(
    worker: DiskWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = Looks(worker, monkeypatch)
    time.sleep(QUITE_LONG_SECONDS)
    assert looks.count == 0
    worker.service.expect_readers(60.0)
    until(lambda: looks.count > 20)


def test_a_worker_rests_again_when_nobody_can_be_reading_any_more(
    worker: DiskWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = Looks(worker, monkeypatch)
    worker.service.expect_readers(QUITE_LONG_SECONDS)
    worker.service.expect_readers(0.0)  # takes nothing back
    until(lambda: looks.count > 2)
    time.sleep(2 * QUITE_LONG_SECONDS)
    counted = looks.count
    time.sleep(QUITE_LONG_SECONDS)
    assert looks.count == counted
