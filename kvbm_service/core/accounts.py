"""What the leader's core tells about its work: facts that have happened, for whoever counts.

The core knows no metrics. It leaves these among its effects, and the shell hands them on.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class Path(enum.StrEnum):
    """A way that blocks go. The first words are those of the guides' metrics."""

    DEVICE_TO_HOST = "offload_d2h"
    HOST_TO_DISK = "offload_h2d"
    DEVICE_TO_DISK = "offload_d2d"
    HOST_TO_DEVICE = "onboard_h2d"
    DISK_TO_DEVICE = "onboard_d2d"
    REMOTE_TO_DEVICE = "onboard_r2d"
    DISK_TO_HOST = "fetch_d2h"
    REMOTE_TO_HOST = "fetch_r2h"


class Transferred(NamedTuple):
    """Blocks have gone a way, on all ranks; or have not."""

    path: Path
    blocks: int
    """Those that arrived."""
    bytes: int
    """Of them, over all ranks."""
    failed: int
    """Those that did not."""
    reason: str
    """Why not; empty if all arrived."""
    seconds: float
    """Of the slowest rank."""


class Looked(NamedTuple):
    """A request's lookup has ended: how many blocks it wanted, and where they were."""

    wanted: int
    host: int
    disk: int
    remote: int


class Refusal(NamedTuple):
    """Blocks that were not kept or lent, and why."""

    reason: str
    blocks: int


Account = Transferred | Looked | Refusal
