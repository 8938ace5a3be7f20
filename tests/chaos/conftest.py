"""One arena for all tests of this folder: its engines start slowly, and end with the last test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbm_service.demo.model import make_model
from tests.chaos.arena import Arena, has_etcd
from tests.chaos.load import Load

MODEL = Path(__file__).parents[2] / "build" / "models" / "tiny"


@pytest.fixture(scope="package")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    folder = tmp_path_factory.mktemp("chaos")
    with Arena(make_model(MODEL), folder, print, on_etcd=has_etcd()) as arena:
        yield arena


@pytest.fixture(scope="package")
def load(arena: Arena) -> Iterator[Load]:
    with Load(list(arena.members.values()), arena.talks) as load:
        yield load
