"""What a trace file may say, and what is said of one that makes no sense."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvbm_service.errors import SettingError
from kvbm_service.replay.trace import Trace

GOOD = '{"timestamp": 1500, "input_length": 9, "output_length": 1, "hash_ids": [0, 1]}'


def written(folder: Path, text: str) -> Path:
    """A trace with this text."""
    path = folder / "trace.jsonl"
    path.write_text(text)
    return path


def test_equal_numbers_are_equal_blocks(tmp_path: Path) -> None:
    trace = Trace.read(written(tmp_path, f"{GOOD}\n\n{GOOD}\n"))
    one, other = trace.requests
    assert one == other
    assert (trace.blocks, trace.unique_blocks) == (4, 2)
    assert one.seconds == 1.5


def test_requests_are_replayed_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    earlier = GOOD.replace("1500", "500")
    trace = Trace.read(written(tmp_path, f"{GOOD}\n{earlier}\n"))
    assert [request.seconds for request in trace.requests] == [0.5, 1.5]


@pytest.mark.parametrize("bad", ["{", '{"timestamp": 1}', GOOD.replace("[0, 1]", '["a"]')])
def test_a_line_that_makes_no_sense_is_named(tmp_path: Path, bad: str) -> None:
    with pytest.raises(SettingError, match=r"trace\.jsonl:2"):
        Trace.read(written(tmp_path, f"{GOOD}\n{bad}\n"))


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="it has none"):
        Trace.read(written(tmp_path, "\n"))
