"""Leases on slots."""

from __future__ import annotations

import pytest

from kvbm_service.core import lease
from kvbm_service.core.lease import LeaseTable


def test_a_released_lease_gives_its_slots_back_once() -> None:
    table = LeaseTable()
    table.grant("t", [3, 1], deadline=10.0)
    assert table.release("t") == [3, 1]
    assert table.release("t") == []
    assert table.expire(now=11.0) == []
    table.check_integrity()


def test_an_unknown_token_releases_nothing() -> None:
    table = LeaseTable()
    table.grant("t", [1], deadline=10.0)
    assert table.release("u") == []
    assert len(table) == 1


def test_a_lease_ends_when_its_time_is_up_and_not_before() -> None:
    table = LeaseTable()
    table.grant("t", [1], deadline=10.0)
    assert table.expire(now=9.9) == []
    assert table.expire(now=10.0) == [[1]]
    assert table.release("t") == []
    table.check_integrity()


def test_leases_end_in_the_order_of_their_deadlines() -> None:
    table = LeaseTable()
    table.grant("late", [1], deadline=3.0)
    table.grant("early", [2], deadline=1.0)
    table.grant("later", [3], deadline=9.0)
    assert table.expire(now=5.0) == [[2], [1]]
    assert len(table) == 1


def test_all_leases_can_be_ended_at_once() -> None:
    table = LeaseTable()
    table.grant("a", [1], deadline=1.0)
    table.grant("b", [2], deadline=2.0)
    assert table.end_all() == [[1], [2]]
    assert table.expire(now=9.0) == []
    table.check_integrity()


def test_a_table_is_full_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "MAX_LEASES", 2)
    table = LeaseTable()
    table.grant("a", [1], deadline=1.0)
    assert not table.full
    table.grant("b", [2], deadline=1.0)
    assert table.full


def test_leases_that_are_released_early_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "MAX_LEASES", 4)
    table = LeaseTable()
    table.grant("kept", [0], deadline=500.0)
    for number in range(100):
        table.grant(f"t{number}", [1], deadline=1000.0)
        table.release(f"t{number}")
        table.expire(now=1.0)
        assert len(table._deadlines) <= 2 * 4
    assert table.expire(now=500.0) == [[0]]
    table.check_integrity()
