"""The ranks of one's own node."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

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
    with pytest.raises(LayoutError, match=r"rank 0 of 4 \(me/0/1\) reported to a leader of 2"):
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


def test_a_refused_rank_is_named_with_the_reason_among_the_missing() -> None:
    roster = Roster(world_size=2, instance="this")
    roster.report(rank_record(rank=0, world_size=2), by_engine=True)
    with pytest.raises(LayoutError):
        roster.listed(rank_record(rank=1, world_size=2))
    with pytest.raises(RanksMissing, match=r"rank 1 of 2 did not .* belongs to the engine ''"):
        roster.require_all(1800.0)


def test_another_process_replaces_the_one_before_for_good() -> None:
    roster = Roster(world_size=1)
    assert not roster.report(rank_record(life=1))
    assert not roster.report(rank_record(life=1))
    assert roster.report(rank_record(life=2))
    assert roster.records[0].agent == "me/0/2"
    with pytest.raises(LayoutError, match=r"me/0/1.* was given up"):
        roster.listed(rank_record(life=1))
    assert roster.records[0].agent == "me/0/2"


@pytest.mark.parametrize("changed", [{"slots": 9}, {"disk_slots": 4}])
def test_a_process_with_other_tiers_cannot_take_a_ranks_place(changed: dict[str, int]) -> None:
    roster = Roster(world_size=1)
    roster.report(rank_record(life=1))
    roster.lose(0)
    with pytest.raises(LayoutError, match=r"come back with .* and had 8 slots of 64 bytes"):
        roster.report(rank_record(life=2, **changed))
    assert roster.missing == [0]


def test_a_rank_of_another_engine_is_refused_by_name() -> None:
    roster = Roster(world_size=1, instance="this")
    record = replace(rank_record(), instance="other")
    with pytest.raises(LayoutError, match=r"rank 0 .*'other', and this is 'this'.*KVBM_NODE_NAME"):
        roster.listed(record)
    assert roster.missing == [0]
    roster.report(record, by_engine=True)
    assert roster.complete, "the engine knows its own ranks"


def test_a_rank_that_only_the_directory_told_of_is_away_when_its_record_ends() -> None:
    roster = Roster(world_size=2)
    roster.listed(rank_record(rank=0, world_size=2))
    roster.report(rank_record(rank=1, world_size=2), by_engine=True)
    roster.listed(rank_record(rank=1, world_size=2))
    assert roster.invisible == roster.away == []
    roster.unlisted(0)
    roster.unlisted(1)
    assert (roster.invisible, roster.away) == ([0, 1], [0])
    assert roster.complete, "nothing proves that its process is no more"
    roster.listed(rank_record(rank=0, world_size=2))
    assert (roster.invisible, roster.away) == ([1], [])


def test_a_rank_that_was_never_listed_is_not_out_of_sight() -> None:
    roster = Roster(world_size=1)
    roster.report(rank_record(), by_engine=True)
    roster.unlisted(0)
    assert roster.invisible == []


def test_a_process_is_out_of_sight_while_its_predecessor_has_the_record() -> None:
    roster = Roster(world_size=1)
    roster.listed(rank_record(life=1))
    roster.report(rank_record(life=2), by_engine=True)
    assert (roster.invisible, roster.away) == ([0], [])
    roster.unlisted(0)
    assert roster.invisible == [0]
    roster.listed(rank_record(life=2))
    assert roster.invisible == []


def test_who_is_only_listed_has_not_the_place_of_whom_the_engine_told_of() -> None:
    """The engine goes on giving its steps to that one, whatever stands in the directory."""
    roster = Roster(world_size=1)
    roster.report(rank_record(life=1), by_engine=True)
    roster.listed(rank_record(life=1))
    with pytest.raises(LayoutError, match=r"me/0/2.* not the process .* told of \(me/0/1\)"):
        roster.listed(rank_record(life=2))
    assert roster.records[0].agent == "me/0/1"
    assert (roster.invisible, roster.away) == ([0], [])
    assert roster.report(rank_record(life=2), by_engine=True), "the engine has the last word"
    assert roster.records[0].agent == "me/0/2"
    assert roster.invisible == [], "it was listed before"
