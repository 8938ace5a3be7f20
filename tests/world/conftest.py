"""A small world for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.world import World
from tests.world.skipping import world_or_skip


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Three hosts."""
    with world_or_skip("a", "b", "c", seed=7) as world:
        yield world
