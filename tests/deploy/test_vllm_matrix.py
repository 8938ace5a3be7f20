"""What `make test-vllm-matrix` says of each release."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.dev import lanes, vllm_matrix
from deploy.dev.lanes import Lane
from deploy.dev.vllm_matrix import COLUMNS, Result, markdown, result, text

MIXED = """
import pytest

def test_one(): pass
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.skipif(True, reason="only vLLM 7 has it")
def test_two(number): pass
@pytest.mark.skip(reason="another day")
def test_three(): pass
"""
BAD = """
def test_four(): assert 17 + 4 == 22
"""
BROKEN = "import no_such_module"
HEADER = """
def pytest_report_header(): return "vllm: 7.1.0+cpu in /somewhere"
"""


@pytest.fixture
def outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Result]:
    """Of one release: with tests that pass, with one that fails, and with one that cannot run."""
    monkeypatch.setattr(lanes, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(HEADER)
    found = {}
    for name, content in {"mixed": MIXED, "bad": BAD, "broken": BROKEN}.items():
        file = tmp_path / "tests" / f"test_{name}.py"
        file.write_text(content)
        lane = Lane(name, ("-ra", str(file)))
        lane.run()
        found[name] = result("7.1.0", lane)
    return found


def test_a_release_is_told_with_its_counts_and_why_tests_were_skipped(
    outcome: dict[str, Result],
) -> None:
    assert outcome["mixed"].cells == (
        "7.1.0", "1", "0", "3", "another day (1); only vLLM 7 has it (2)",
    )  # fmt: skip


def test_a_release_that_fails_or_cannot_be_tested_does_not_look_like_one_that_passes(
    outcome: dict[str, Result],
) -> None:
    assert outcome["mixed"].good
    assert outcome["bad"].cells[:3] == outcome["broken"].cells[:3] == ("7.1.0", "0", "1")
    stopped = result("7.1.0", Lane("stopped", (), output="vllm: 7.1.0 in x", status=1))
    assert stopped.cells[:3] == ("7.1.0", "0", "did not run to the end")
    assert not any(each.good for each in (outcome["bad"], outcome["broken"], stopped))


def test_tests_that_ran_on_another_release_tell_nothing_of_this_one() -> None:
    for header, told in {"vllm: 7.1.0+cpu in x": "ran on 7.1.0", "": "ran on nobody knows"}.items():
        other = result("7.1", Lane("7.1", (), output=header, status=0))
        assert other.cells[2].startswith(told)
        assert not other.good


def test_both_tables_have_a_row_for_each_release(outcome: dict[str, Result]) -> None:
    results = list(outcome.values())
    assert [line.split()[0] for line in text(results).splitlines()] == [COLUMNS[0], *["7.1.0"] * 3]
    lines = markdown(results, "Seen today.").splitlines()
    assert [line.split()[1] for line in lines[:5]] == [COLUMNS[0], "---", *["7.1.0"] * 3]
    assert {line.count("|") for line in lines[:5]} == {len(COLUMNS) + 1}
    assert lines[-1] == "Seen today."


def test_one_bad_release_fails_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lanes, "ROOT", tmp_path)
    monkeypatch.setattr(vllm_matrix, "ROOT", tmp_path)
    monkeypatch.setattr(lanes, "OLDER_FOLDER", "tests/test_bad.py")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(HEADER.replace("7.1.0", vllm_matrix.VLLM))
    (tmp_path / "tests" / "test_bad.py").write_text(BAD)
    monkeypatch.setattr("sys.argv", ["vllm_matrix", vllm_matrix.VLLM])
    monkeypatch.setattr(vllm_matrix, "end_with_us", lambda lanes: None)
    assert vllm_matrix.main() == 1
    assert f"| {vllm_matrix.VLLM} | 0 | 1 |" in (tmp_path / vllm_matrix.MARKDOWN).read_text()
    assert vllm_matrix.MARKDOWN in capsys.readouterr().out
