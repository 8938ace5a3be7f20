"""A few rows of the table, and how it judges."""

from __future__ import annotations

import msgspec
import pytest

from tests.models.outcome import Outcome, faults
from tests.models.rows import ROWS, Row
from tests.models.run import ROW_SECONDS, run

GOOD = Outcome(
    prompts=5,
    block_tokens=32,
    groups=1,
    own_blocks=63,
    our_blocks=63,
    expected_blocks=63,
    own_as_computed=5,
    ours_as_computed=5,
    ours_as_own=5,
    furthest=0.0,
    furthest_from_computed=0.0,
    different=5,
)


@pytest.mark.engine
@pytest.mark.timeout(ROW_SECONDS + 60)
@pytest.mark.parametrize("name", ["mla", "hybrid", "lora"])
def test_answers_stay_the_same_when_blocks_come_from_our_tier(name: str) -> None:
    assert faults(ROWS[name], run(name)) == []


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"different": 4}, "two prompts have the same answer"),
        ({"our_blocks": 62}, "62 blocks reused, not 63"),
        ({"ours_as_own": 4}, "differ from those with vLLM's own reuse"),
        ({"furthest": 1e-6}, "differ from those with vLLM's own reuse"),
        ({"ours_as_computed": 4, "own_as_computed": 4}, "differ from the computed ones"),
    ],
)
def test_a_row_that_does_not_hold_says_what_is_wrong(bad: dict[str, object], words: str) -> None:
    assert faults(Row("gqa", ""), GOOD) == []
    (said,) = faults(Row("gqa", ""), msgspec.structs.replace(GOOD, **bad))
    assert words in said


def test_sixteen_bits_may_differ_from_computing_but_not_from_vllms_own_reuse() -> None:
    row = Row("gqa", "", exact=False)
    assert faults(row, msgspec.structs.replace(GOOD, own_as_computed=4, ours_as_computed=4)) == []
    assert faults(row, msgspec.structs.replace(GOOD, ours_as_own=4)) != []


def test_a_model_that_was_not_split_into_groups_proves_nothing_about_them() -> None:
    assert faults(ROWS["hybrid"], GOOD) == ["1 KV cache group(s)"]
