"""Runs a row in processes of its own, which end with it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from kvbm_service.demo.process_group import end_group
from tests.models.outcome import Outcome
from tests.models.rows import ROWS

ROOT = Path(__file__).parents[2]
LOGS = ROOT / "build" / "models" / "logs"
ROW_SECONDS = 500.0
"""On a quiet machine a row takes half a minute."""


class RowFailed(Exception):
    """The row came to no outcome; says where its log is."""


def run(name: str) -> Outcome:
    """Run the row of this name.

    Raises:
        RowFailed: it ended with an error, or not in time.
    """
    assert name in ROWS
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}.log"
    paths = [str(ROOT / part) for part in ("", "schemas", "connectors")]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    with tempfile.TemporaryDirectory(prefix="kvbm-row-") as folder, log.open("wb") as output:
        outcome = Path(folder) / "outcome.json"
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.models.probe", name, str(outcome)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(ROW_SECONDS)
        except subprocess.TimeoutExpired:
            raise RowFailed(f"{name} did not end within {ROW_SECONDS:g} s: see {log}") from None
        finally:
            end_group(process.pid)
            process.wait()
        if not outcome.exists():
            raise RowFailed(f"{name} ended with status {process.returncode}: see {log}")
        return msgspec.json.decode(outcome.read_bytes(), type=Outcome)
