"""A rank carries each fetch out once, by whatever way and how often it is told."""

from __future__ import annotations

import threading

import pytest

from kvbm_schemas.step import Moved
from kvbm_service import fetched as fetched_module
from kvbm_service.core.columns import pack_u32
from kvbm_service.fetched import Fetched

DONE = Moved(op=1, seconds=0.5)


def test_a_fetch_is_carried_out_and_whoever_asked_is_told() -> None:
    fetched, heard = Fetched(), list[Moved]()
    assert fetched.begin(1, heard.append, 1)
    assert heard == []
    fetched.end(DONE)
    assert heard == [DONE]


def test_a_fetch_that_comes_again_while_it_is_under_way_is_carried_out_once() -> None:
    fetched, by_bus, by_step = Fetched(), list[Moved](), list[Moved]()
    assert fetched.begin(1, by_bus.append, 1)
    assert not fetched.begin(1, by_step.append, 1)
    fetched.end(DONE)
    assert by_bus == by_step == [DONE]


def test_a_fetch_that_comes_again_later_is_answered_with_what_became_of_it() -> None:
    fetched, heard = Fetched(), list[Moved]()
    fetched.begin(1, lambda _: None, 1)
    fetched.end(DONE)
    assert not fetched.begin(1, heard.append, 1)
    assert not fetched.begin(1, heard.append, 1)
    assert heard == [DONE, DONE]


def test_a_fetch_that_failed_is_not_tried_again() -> None:
    """Its slots may be in use for something else by now."""
    fetched, heard = Fetched(), list[Moved]()
    failed = Moved(op=1, failed=bytes(4), reason="gone")
    fetched.begin(1, lambda _: None, 1)
    fetched.end(failed)
    assert not fetched.begin(1, heard.append, 1)
    assert heard == [failed]


def test_fetches_do_not_mind_each_other_nor_their_order() -> None:
    fetched, heard = Fetched(), list[Moved]()
    assert fetched.begin(5, heard.append, 1)
    assert fetched.begin(3, heard.append, 1)
    fetched.end(Moved(op=3))
    assert heard == [Moved(op=3)]
    fetched.end(Moved(op=5))
    assert heard == [Moved(op=3), Moved(op=5)]


def remembering_two(monkeypatch: pytest.MonkeyPatch) -> Fetched:
    """Ops 1 to 4 are done, and the first two of them are forgotten."""
    monkeypatch.setattr(fetched_module, "MAX_REMEMBERED", 2)
    fetched = Fetched()
    for op in range(1, 5):
        assert fetched.begin(op, lambda _: None, 1)
        fetched.end(Moved(op=op))
    return fetched


@pytest.mark.parametrize("op", [0, 1, 2])
def test_a_fetch_so_old_that_it_is_forgotten_is_not_carried_out_and_counts_as_failed(
    op: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched, heard = remembering_two(monkeypatch), list[Moved]()
    assert not fetched.begin(op, heard.append, 2)
    assert [(moved.op, moved.failed) for moved in heard] == [(op, pack_u32([0, 1]))]


def test_what_is_not_that_old_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched, heard = remembering_two(monkeypatch), list[Moved]()
    assert not fetched.begin(3, heard.append, 1)
    assert heard == [Moved(op=3)]
    assert fetched.begin(5, heard.append, 1)


def test_a_fetch_that_takes_long_is_answered_though_many_others_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetched_module, "MAX_REMEMBERED", 2)
    fetched, heard = Fetched(), list[Moved]()
    assert fetched.begin(1, heard.append, 1)
    for op in range(2, 8):
        assert fetched.begin(op, lambda _: None, 1)
        fetched.end(Moved(op=op))
    assert not fetched.begin(1, heard.append, 1), "it is still under way"
    fetched.end(DONE)
    assert heard == [DONE, DONE]


def test_of_many_threads_that_come_with_one_fetch_one_carries_it_out() -> None:
    fetched = Fetched()
    together = threading.Barrier(8)
    began, heard = list[bool](), list[Moved]()

    def come() -> None:
        together.wait()
        began.append(mine := fetched.begin(1, heard.append, 1))
        if mine:
            fetched.end(DONE)

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(began) == [False] * 7 + [True]
    assert heard == [DONE] * 8


def test_telling_may_begin_another_fetch() -> None:
    """Nobody is told while the lock is held."""
    fetched, heard = Fetched(), list[Moved]()
    fetched.begin(1, lambda _: heard.append(Moved(op=int(fetched.begin(2, heard.append, 1)))), 1)
    fetched.end(DONE)
    assert heard == [Moved(op=1)]
