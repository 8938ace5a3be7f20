"""How long leases last in tests, where any process may stand still for a second or two."""

from __future__ import annotations

import pytest

LASTING_SECONDS = 6.0
"""No lease ends that is renewed."""
ENDING_SECONDS = 3.0
"""Somebody waits for the end; what has to happen before does, too."""

leases_end = pytest.mark.parametrize("lease_seconds", [pytest.param(ENDING_SECONDS, id="ending")])
"""For tests that wait for the end of a lease; all others have lasting ones."""
