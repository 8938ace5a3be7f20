"""The other nodes that can be read from."""

from __future__ import annotations

import pytest

from kvbm_service.core.peers import SHUN_SECONDS, Peers
from tests.core.builders import node_record, rank_record


@pytest.fixture
def peers() -> Peers:
    return Peers(layouts=("",))


def meet(peers: Peers, node: str = "b", life: int = 1) -> None:
    peers.leader_changed(node, node_record(node, epoch=life))
    peers.rank_changed(node, 0, rank_record(node, life=life))


def test_a_node_can_be_asked_when_its_leader_and_all_ranks_are_there() -> None:
    peers = Peers(layouts=("", ""))
    assert not peers.can_ask("b", now=0.0)
    peers.leader_changed("b", node_record("b", world_size=2))
    peers.rank_changed("b", 1, rank_record("b", rank=1, world_size=2))
    assert not peers.can_ask("b", now=0.0)
    peers.rank_changed("b", 0, rank_record("b", rank=0, world_size=2))
    assert peers.can_ask("b", now=0.0)
    peers.leader_changed("b", None)
    assert not peers.can_ask("b", now=0.0)


def test_a_node_of_another_size_is_not_asked(peers: Peers) -> None:
    peers.leader_changed("b", node_record("b", world_size=2))
    for rank in (0, 1):
        peers.rank_changed("b", rank, rank_record("b", rank=rank, world_size=2))
    assert not peers.can_ask("b", now=0.0)


def test_agents_count_only_when_they_are_the_present_ones_in_rank_order() -> None:
    peers = Peers(layouts=("", ""))
    peers.leader_changed("b", node_record("b", world_size=2))
    for rank in (0, 1):
        peers.rank_changed("b", rank, rank_record("b", rank=rank, world_size=2))
    assert peers.knows("b", ("b/0/1", "b/1/1"), epoch=1)
    assert not peers.knows("b", ("b/1/1", "b/0/1"), epoch=1)
    assert not peers.knows("b", ("b/0/1",), epoch=1)
    assert not peers.knows("b", ("b/0/2", "b/1/2"), epoch=1)
    assert not peers.knows("c", ("b/0/1", "b/1/1"), epoch=1)
    peers.rank_changed("b", 1, None)
    assert not peers.knows("b", ("b/0/1", "b/1/1"), epoch=1)


@pytest.mark.parametrize("other", [6, 8], ids=["earlier", "later"])
def test_what_a_leader_says_in_another_life_than_the_directory_lists_does_not_count(
    peers: Peers, other: int
) -> None:
    peers.rank_changed("b", 0, rank_record("b"))
    assert not peers.knows("b", ("b/0/1",), epoch=7)
    peers.leader_changed("b", node_record("b", epoch=7))
    assert peers.knows("b", ("b/0/1",), epoch=7)
    assert not peers.knows("b", ("b/0/1",), epoch=other)


def test_a_node_that_failed_us_is_left_alone_for_a_while(peers: Peers) -> None:
    meet(peers)
    peers.shun("b", now=100.0)
    assert not peers.can_ask("b", now=100.0 + SHUN_SECONDS - 0.1)
    assert peers.can_ask("b", now=100.0 + SHUN_SECONDS)


def test_a_new_life_of_a_shunned_node_is_asked_at_once(peers: Peers) -> None:
    meet(peers)
    peers.shun("b", now=100.0)
    peers.leader_changed("b", node_record("b", epoch=1))
    assert not peers.can_ask("b", now=100.0)
    peers.leader_changed("b", node_record("b", epoch=2))
    assert peers.can_ask("b", now=100.0)


def test_shunning_a_node_that_has_left_leaves_no_trace(peers: Peers) -> None:
    meet(peers)
    peers.leader_changed("b", None)
    peers.shun("b", now=1.0)
    assert not peers._shunned


def test_ranks_that_came_are_told_once(peers: Peers) -> None:
    meet(peers)
    assert peers.take_news() == ((rank_record("b"),), ())
    peers.rank_changed("b", 0, rank_record("b"))
    assert peers.take_news() == ((), ())


def test_a_restarted_rank_is_one_gone_and_one_come(peers: Peers) -> None:
    meet(peers)
    peers.take_news()
    peers.rank_changed("b", 0, rank_record("b", life=2))
    assert peers.take_news() == ((rank_record("b", life=2),), ("b/0/1",))


def test_a_rank_that_came_and_went_between_two_steps_is_never_mentioned(peers: Peers) -> None:
    meet(peers)
    peers.rank_changed("b", 0, None)
    assert peers.take_news() == ((), ())


def test_a_rank_that_went_and_came_back_between_two_steps_is_met_anew(peers: Peers) -> None:
    meet(peers)
    peers.take_news()
    peers.rank_changed("b", 0, None)
    peers.rank_changed("b", 0, rank_record("b"))
    assert peers.take_news() == ((rank_record("b"),), ("b/0/1",))


def test_the_loss_of_an_unknown_rank_changes_nothing(peers: Peers) -> None:
    peers.rank_changed("b", 0, None)
    assert peers.take_news() == ((), ())


def test_a_new_rank_of_ones_own_meets_everyone(peers: Peers) -> None:
    meet(peers, "b")
    peers.take_news()
    meet(peers, "c")
    peers.tell_again()
    came, gone = peers.take_news()
    assert set(came) == {rank_record("b"), rank_record("c")}
    assert gone == ("b/0/1",), "c was not met by anyone yet"
    peers.tell_again()
    peers.rank_changed("b", 0, None)
    came, gone = peers.take_news()
    assert came == (rank_record("c"),)
    assert sorted(gone) == ["b/0/1", "c/0/1"]
