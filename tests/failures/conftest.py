"""What the tests of failures share: file systems with faults, and a real nats-server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbm_service.adapters.nats_server import EmbeddedNats
from tests.contracts.file_systems import mount, on_loop

__all__ = ["mount", "on_loop"]


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[EmbeddedNats]:
    with EmbeddedNats(store_dir=tmp_path / "nats") as server:
        yield server
