"""A registry on a host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.world.hosts import Host


def start_registry(
    host: Host, url: str, log: Path, membership_seconds: float
) -> subprocess.Popen[Any]:
    """Start one; it answers questions a little later. It ends with its host."""
    return host.start(
        [sys.executable, "-m", "kvbm_service.cli", "registry", "--nats-url", url],
        log,
        {
            "KVBM_MEMBERSHIP_SECONDS": str(membership_seconds),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
    )
