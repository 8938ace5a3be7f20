"""The ranks of one's own node."""

from __future__ import annotations

import pytest

from kvbm_service.core.roster import Roster
from kvbm_service.errors import LayoutError, RanksMissing
from tests.core.builders import rank_record


def test_a_roster_is_complete_when_every_rank_has_reported() -> None:
    roster = Roster(world_size=2)
    roster.report(rank_record(rank=1, world_size=2))
    assert roster.missing == [0]
    assert not roster.complete
    roster.report(rank_record(rank=0, world_size=2))
    assert roster.complete
    assert [record.rank for record in roster.records] == [0, 1]
    assert roster.block_bytes == 128


def test_a_rank_of_an_engine_of_another_size_is_refused() -> None:
    roster = Roster(world_size=2)
    with pytest.raises(LayoutError, match="rank 0 of 4 reported to a leader of 2"):
        roster.report(rank_record(rank=0, world_size=4))
    with pytest.raises(LayoutError):
        roster.report(rank_record(rank=2, world_size=2))
    assert roster.missing == [0, 1]


def test_a_lost_rank_is_missing_again() -> None:
    roster = Roster(world_size=1)
    roster.report(rank_record())
    roster.lose(0)
    assert roster.missing == [0]
    roster.lose(0)


def test_the_missing_ranks_are_named() -> None:
    roster = Roster(world_size=3)
    roster.report(rank_record(rank=1, world_size=3))
    with pytest.raises(RanksMissing, match=r"rank 0, 2 of 3 did not report within 1800 s"):
        roster.require_all(1800.0)
    for rank in (0, 2):
        roster.report(rank_record(rank=rank, world_size=3))
    roster.require_all(1800.0)


def test_a_rank_that_reports_again_replaces_itself() -> None:
    roster = Roster(world_size=1)
    roster.report(rank_record(life=1))
    roster.report(rank_record(life=2))
    assert roster.records[0].agent == "me/0/2"
