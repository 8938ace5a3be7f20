"""How long leases last in tests, where any process may stand still for a second or two."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from kvbm_service.adapters.leased_records import LeasedRecords
from kvbm_service.errors import DirectoryError
from tests.patience import PATIENCE_SECONDS

LASTING_SECONDS = 6.0
"""No lease ends that is renewed."""
ENDING_SECONDS = 3.0
"""Somebody waits for the end; what has to happen before does, too."""

leases_end = pytest.mark.parametrize("lease_seconds", [pytest.param(ENDING_SECONDS, id="ending")])
"""For tests that wait for the end of a lease; all others have lasting ones."""


async def until_renewed(directory: LeasedRecords) -> None:
    """Wait until the owner of the only record has renewed it by itself."""
    revisions = set[int]()
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(revisions) < 2:
            with contextlib.suppress(DirectoryError):  # it is not back yet
                revisions |= {entry.revision for entry in await directory.entries()}
            await asyncio.sleep(0.05)
