"""A rank carries each fetch out once, by whatever way and how often it is told."""

from __future__ import annotations

import threading

import pytest

from kvbm_schemas.step import Moved
from kvbm_service import once as once_module
from kvbm_service.core.columns import pack_u32
from kvbm_service.once import Once

DONE = Moved(op=1, seconds=0.5)


def test_a_fetch_is_carried_out_and_whoever_asked_is_told() -> None:
    once, heard = Once(), list[Moved]()
    assert once.begin(1, heard.append, 1)
    assert heard == []
    once.end(DONE)
    assert heard == [DONE]


def test_a_fetch_that_comes_again_while_it_is_under_way_is_carried_out_once() -> None:
    once, by_bus, by_step = Once(), list[Moved](), list[Moved]()
    assert once.begin(1, by_bus.append, 1)
    assert not once.begin(1, by_step.append, 1)
    once.end(DONE)
    assert by_bus == by_step == [DONE]


def test_a_fetch_that_comes_again_later_is_answered_with_what_became_of_it() -> None:
    once, heard = Once(), list[Moved]()
    once.begin(1, lambda _: None, 1)
    once.end(DONE)
    assert not once.begin(1, heard.append, 1)
    assert not once.begin(1, heard.append, 1)
    assert heard == [DONE, DONE]


def test_a_fetch_that_failed_is_not_tried_again() -> None:
    """Its slots may be in use for something else by now."""
    once, heard = Once(), list[Moved]()
    failed = Moved(op=1, failed=bytes(4), reason="gone")
    once.begin(1, lambda _: None, 1)
    once.end(failed)
    assert not once.begin(1, heard.append, 1)
    assert heard == [failed]


def test_fetches_do_not_mind_each_other_nor_their_order() -> None:
    once, heard = Once(), list[Moved]()
    assert once.begin(5, heard.append, 1)
    assert once.begin(3, heard.append, 1)
    once.end(Moved(op=3))
    assert heard == [Moved(op=3)]
    once.end(Moved(op=5))
    assert heard == [Moved(op=3), Moved(op=5)]


def remembering_two(monkeypatch: pytest.MonkeyPatch) -> Once:
    """Ops 1 to 4 are done, and the first two of them are forgotten."""
    monkeypatch.setattr(once_module, "MAX_REMEMBERED", 2)
    once = Once()
    for op in range(1, 5):
        assert once.begin(op, lambda _: None, 1)
        once.end(Moved(op=op))
    return once


@pytest.mark.parametrize("op", [0, 1, 2])
def test_a_fetch_so_old_that_it_is_forgotten_is_not_carried_out_and_counts_as_failed(
    op: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, heard = remembering_two(monkeypatch), list[Moved]()
    assert not once.begin(op, heard.append, 2)
    assert [(moved.op, moved.failed) for moved in heard] == [(op, pack_u32([0, 1]))]


def test_what_is_not_that_old_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    once, heard = remembering_two(monkeypatch), list[Moved]()
    assert not once.begin(3, heard.append, 1)
    assert heard == [Moved(op=3)]
    assert once.begin(5, heard.append, 1)


def test_a_fetch_that_takes_long_is_answered_though_many_others_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(once_module, "MAX_REMEMBERED", 2)
    once, heard = Once(), list[Moved]()
    assert once.begin(1, heard.append, 1)
    for op in range(2, 8):
        assert once.begin(op, lambda _: None, 1)
        once.end(Moved(op=op))
    assert not once.begin(1, heard.append, 1), "it is still under way"
    once.end(DONE)
    assert heard == [DONE, DONE]


def test_of_many_threads_that_come_with_one_fetch_one_carries_it_out() -> None:
    once = Once()
    together = threading.Barrier(8)
    began, heard = list[bool](), list[Moved]()

    def come() -> None:
        together.wait()
        began.append(mine := once.begin(1, heard.append, 1))
        if mine:
            once.end(DONE)

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(began) == [False] * 7 + [True]
    assert heard == [DONE] * 8


def test_telling_may_begin_another_fetch() -> None:
    """Nobody is told while the lock is held."""
    once, heard = Once(), list[Moved]()
    once.begin(1, lambda _: heard.append(Moved(op=int(once.begin(2, heard.append, 1)))), 1)
    once.end(DONE)
    assert heard == [Moved(op=1)]
