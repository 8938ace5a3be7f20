"""Killed with kill -9 at a random moment, a hundred times on the same files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.contracts.disk_crasher import SLOTS, Life

KILLS = 100
SECONDS = 110.0


@pytest.mark.slow
def test_a_hundred_kills_leave_no_wrong_byte_and_no_start_fails(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.contracts.disk_crasher", tmp_path, str(KILLS)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        timeout=SECONDS,
        check=True,
    )
    lives = [msgspec.json.decode(line, type=Life) for line in ran.stdout.splitlines()]
    assert len(lives) == KILLS + 1
    assert not [life.ended for life in lives if life.ended], "no life ends but by a kill"
    assert lives[-1].reported
    assert sum(life.reported for life in lives) > KILLS / 2
    assert sum(life.wrong for life in lives) == 0
    # Only a power failure parts an entry from its data, so all that is listed is there.
    assert sum(life.refused for life in lives) == 0
    assert sum(life.right for life in lives) > KILLS * SLOTS / 10
    assert lives[-1].newest > KILLS, "blocks were written in every life"
