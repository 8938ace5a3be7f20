"""What `make test` says about tests that ran side by side."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.dev import lanes
from deploy.dev.lanes import Lane, all_lanes, run_all

ROOT = Path(__file__).parents[2]

GOOD = """
import pytest

def test_one(): print("never seen")
def test_two(): pass
@pytest.mark.skip
def test_three(): pass
"""
BAD = """
def test_four(): assert 17 + 4 == 22
"""
SHY = """
import pathlib

def test_six():
    seen = pathlib.Path("seen")
    before = seen.exists()
    seen.touch()
    assert before
"""
ENDLESS = """
import pathlib, subprocess, time

def test_five():
    child = subprocess.Popen(["sleep", "600"])
    pathlib.Path("started").write_text(str(child.pid))
    time.sleep(600)
"""
STOPPED = """
import pathlib, sys
from deploy.dev import lanes

lanes.ROOT = pathlib.Path(sys.argv[1])
both = [lanes.Lane(name, (f"tests/test_{name}.py",)) for name in ("endless", "good")]
lanes.end_with_us(both)
sys.exit(lanes.run_all(both, at_once=1))
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another checkout, with a few tests."""
    (tmp_path / "tests").mkdir()
    for name, text in {"good": GOOD, "bad": BAD, "endless": ENDLESS}.items():
        (tmp_path / "tests" / f"test_{name}.py").write_text(text)
    monkeypatch.setattr(lanes, "ROOT", tmp_path)
    return tmp_path


def lane(name: str) -> Lane:
    return Lane(name, (f"tests/test_{name}.py",))


def test_all_is_well_when_every_lane_is(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_all([lane("good"), Lane("again", ("tests/test_good.py",))], at_once=2) == 0
    assert re.search(r"^=+ 4 passed, 2 skipped in \d+\.\d\ds =+$", said(capsys)[-1])


def test_one_failure_fails_the_whole_and_is_told_with_its_traceback_and_once_more_at_the_end(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_all([lane("bad"), lane("good")], at_once=2) == 1
    lines = said(capsys)
    assert any("assert (17 + 4) == 22" in line for line in lines)
    assert re.search(r"^FAILED tests/test_bad.py::test_four.*\[bad\]$", lines[-2])
    assert re.search(r"^=+ 1 failed, 2 passed, 1 skipped in \d+\.\d\ds =+$", lines[-1])


def test_what_fails_only_beside_others_is_asked_again_and_named(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "tests" / "test_shy.py").write_text(SHY)
    assert run_all([lane("shy"), lane("good")], at_once=2) == 0
    lines = said(capsys)
    assert re.search(r"^=+ 3 passed, 1 skipped in \d+\.\d\ds =+$", lines[-1])
    assert any("shy" in line and "UNSTEADY: 1" in line for line in lines)
    assert any(line.startswith("FAILED tests/test_shy.py::test_six") for line in lines)


def test_many_failures_are_not_asked_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MAX_ASKED_AGAIN", 0)
    (project / "tests" / "test_shy.py").write_text(SHY)
    assert run_all([lane("shy")], at_once=1) == 1


def test_what_a_lane_says_stands_together(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "MAX_ASKED_AGAIN", 0)
    run_all([lane("bad"), lane("good")], at_once=2)
    starts = [line for line in said(capsys) if "test session starts" in line or "# lane " in line]
    assert ["# lane " in line for line in starts] == [True, False, True, False]


def test_a_lane_in_which_nothing_runs_has_failed(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_all([lane("good"), lane("forgotten")], at_once=1) == 1
    assert any("tests/test_forgotten.py" in line for line in said(capsys))


def test_an_end_from_outside_ends_all_lanes_and_tells_what_they_have_found(project: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(project)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as running:
        assert running.stdout is not None
        started = project / "started"
        while running.poll() is None and not (started.exists() and started.read_text()):
            time.sleep(0.02)
        running.send_signal(signal.SIGTERM)
        text = running.stdout.read()
    assert running.returncode == 1
    assert "KeyboardInterrupt" in text
    assert "no tests counted in" in text.splitlines()[-1]
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_every_older_release_has_a_lane_and_every_folder_is_in_one() -> None:
    found = {lane.name: lane for lane in all_lanes(["1.0", "2.0"])}
    assert {"engines", "vLLM 1.0", "vLLM 2.0"} <= set(found)
    for folder in lanes.APART:
        assert (ROOT / folder).is_dir(), "a lane of its own for nothing"
        assert folder in found[Path(folder).name].arguments
        assert f"--ignore={folder}" in found["everything else"].arguments


def test_older_releases_leave_out_what_says_nothing_of_them() -> None:
    lanes_of_older = [lane for lane in all_lanes(["1.0"]) if lane.release]
    assert [lanes.NOT_AGAIN in lane.arguments for lane in lanes_of_older] == [True]
    assert all(lanes.NOT_AGAIN not in lane.arguments for lane in all_lanes([]))


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()
