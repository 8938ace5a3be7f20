"""What is kept in files is for their owner alone, whatever the process's umask."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.disk_file import DiskFile
from kvbm_service.adapters.homes import Home
from kvbm_service.adapters.nats_server import EmbeddedNats
from kvbm_service.adapters.slab_memory import lasting


@pytest.fixture(autouse=True)
def careless() -> Iterator[None]:
    """A process that keeps nobody out by itself."""
    before = os.umask(0)
    yield
    os.umask(before)


def open_to_others(folder: Path) -> list[Path]:
    """What below `folder` another user could read or write, going by its own mode."""
    return [
        path
        for path in folder.rglob("*")
        if stat.S_IMODE(path.lstat().st_mode) & 0o077 and not path.is_symlink()
    ]


def test_a_disk_tier_is_for_its_owner(tmp_path: Path) -> None:
    home = Home.claim(tmp_path / "cache", Scope("default", "0"), "life", "X")
    DiskFile(home.path / "disk-0.blocks", 1 << 20, direct=False).close()
    assert open_to_others(tmp_path) == []
    home.close()


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="this machine has no /dev/shm")
def test_a_host_tier_in_shared_memory_is_for_its_owner() -> None:
    with tempfile.TemporaryDirectory(prefix="kvbm-tests-", dir="/dev/shm") as folder:
        home = Home.claim(Path(folder), Scope("default", "0"), "life", "X")
        memory = lasting(home.path / "host-0.slab", 1 << 20, "layout")
        assert memory is not None
        assert open_to_others(Path(folder)) == []
        home.close()


def test_the_embedded_servers_configuration_is_for_its_owner() -> None:
    with EmbeddedNats(user="me", password="secret") as server:
        configuration = server.log_path.parent / "server.json"
        assert "secret" in configuration.read_text()
        assert stat.S_IMODE(configuration.stat().st_mode) == 0o600
