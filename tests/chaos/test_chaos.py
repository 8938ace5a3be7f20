"""A short run of everything at once, as `make chaos` does it, and what it says at its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from kvbm_schemas.block import Tier
from kvbm_schemas.events import Loaded
from tests.chaos.__main__ import INTERRUPTED
from tests.chaos.arena import Arena
from tests.chaos.load import Load
from tests.chaos.report import last_line, passed, show
from tests.chaos.schedule import schedule
from tests.chaos.trial import Result, cards, play
from tests.integration.witness import Report

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

SECONDS = 45.0
SEED = 3
PROCESSES = 7
"""Begun at once: NATS, two registries, four engines."""
ENDS_SECONDS = 180.0
GONE_SECONDS = 30.0
"""Python's resource trackers end a little later than those whose resources they track."""
ROOT = Path(__file__).parents[2]


def test_ended_by_ctrl_c_it_leaves_no_process(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos", "--logs", tmp_path / "logs"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + ENDS_SECONDS
        while len(found := descendants(process.pid)) < PROCESSES:
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=ENDS_SECONDS)
    finally:
        process.kill()
        process.wait()
    assert json.loads(said.splitlines()[-1])["faults"] == 0
    assert process.returncode == INTERRUPTED
    deadline = time.monotonic() + GONE_SECONDS
    while left := list(filter(is_running, found)):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_faults_at_random_make_no_answer_wrong_or_late_and_leave_nothing_behind(
    arena: Arena, load: Load
) -> None:
    report = arena.witness.listen()
    kinds = [card for card in cards(arena) if not card.restarts]
    result = Result()
    for outcome in play(arena, load, schedule(SEED, kinds), SECONDS, print):
        result.add(outcome)
    show(result, Console())
    assert result.problems == []
    assert passed(result)
    assert result.faults.total() > 0
    told = json.loads(last_line(result))
    assert list(told) == ["requests", "faults", "wrong", "stalls", "leaks", "heal_seconds_max"]
    assert told["requests"] > told["faults"] > 0
    assert {"ann", "bob"} <= set(report.sources("ann")), "it loads its own blocks, and another's"
    assert set(report.sources("wim")) == {"wim"}
    assert handed_over(report, "ann")
    assert handed_over(report, "bob")


def handed_over(report: Report, node: str) -> int:
    """How many blocks the node has read from another engine's device pool."""
    sources = [source for loaded in report.of(Loaded, node) for source in loaded.sources]
    return sum(source.blocks for source in sources if source.tier is Tier.DEVICE)


def descendants(process: int) -> list[int]:
    """All that it has started, and what they have."""
    children: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has just ended
            children += map(int, task.read_text().split())
    return children + [deeper for child in children for deeper in descendants(child)]


def is_running(process: int) -> bool:
    """Whether it is there, and not only because nobody has asked how it ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
