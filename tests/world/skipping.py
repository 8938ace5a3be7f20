"""Hosts for tests, which are skipped where this machine does not let us make any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.world.hosts import NotPermitted, World


@contextmanager
def world_or_skip(*names: str, seed: int = 0) -> Iterator[World]:
    """A world with these hosts; where that is not permitted, skip, and say what is missing."""
    with ExitStack() as stack:
        try:
            world = stack.enter_context(World(*names, seed=seed))
        except NotPermitted as error:
            pytest.skip(f"no hosts can be made here: {error}")
        yield world
