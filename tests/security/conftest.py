"""A cluster as we tell people to run it, and our commands with somebody's credentials."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.security.cluster import Cluster, guarded_cluster

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 60.0

Kvbm = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def kvbm() -> Kvbm:
    """Run `kvbm` with these arguments to its end; variables of the environment by name."""

    def run(
        *arguments: str, environ: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        roots = os.pathsep.join(str(ROOT / root) for root in ("", "schemas", "connectors"))
        return subprocess.run(
            [sys.executable, "-m", "kvbm_service.cli", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": roots, "NO_COLOR": "1", **(environ or {})},
            timeout=DEADLINE_SECONDS,
            check=False,
        )

    return run


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """A registry and two nodes, under the shipped permissions."""
    async with guarded_cluster(tmp_path) as cluster:
        yield cluster
