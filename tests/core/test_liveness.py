from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvbm_service.core.liveness import Liveness

LEASE = 10.0


def look_until(table: Liveness, start: float, end: float, step: float = 1.0) -> list[str]:
    """Look as often as an observer does; all keys that expired on the way."""
    ended = []
    now = start
    while now <= end:
        ended += table.expired(now)
        now += step
    return ended


def test_a_key_lives_for_one_lease_after_its_last_renewal() -> None:
    table = Liveness(LEASE)
    assert table.renewed("a", 1, now=0.0)
    assert look_until(table, 0.0, 9.0) == []
    assert table.expired(now=10.0) == ["a"]
    assert table.expired(now=11.0) == []


def test_a_new_revision_renews_and_is_not_a_new_key() -> None:
    table = Liveness(LEASE)
    table.renewed("a", 1, now=0.0)
    assert not table.renewed("a", 2, now=6.0)
    assert look_until(table, 0.0, 15.0) == []
    assert table.expired(now=16.0) == ["a"]


def test_reading_the_same_revision_again_renews_nothing() -> None:
    table = Liveness(LEASE)
    table.renewed("a", 7, now=0.0)
    assert not table.renewed("a", 7, now=6.0)
    assert look_until(table, 0.0, 10.0) == ["a"]


def test_revisions_that_start_again_from_one_renew_too() -> None:
    table = Liveness(LEASE)
    table.renewed("a", 900, now=0.0)
    assert not table.renewed("a", 1, now=6.0)
    assert look_until(table, 0.0, 15.0) == []


def test_a_key_that_left_is_neither_alive_nor_ever_reported_expired() -> None:
    table = Liveness(LEASE)
    table.renewed("a", 1, now=0.0)
    assert table.gone("a")
    assert not table.gone("a")
    assert "a" not in table
    assert look_until(table, 0.0, 30.0) == []


def test_a_key_that_comes_back_is_new_again() -> None:
    table = Liveness(LEASE)
    table.renewed("a", 1, now=0.0)
    assert look_until(table, 0.0, 10.0) == ["a"]
    assert table.renewed("a", 1, now=12.0)
    assert "a" in table


def test_an_observer_that_slept_does_not_bury_everyone_at_once() -> None:
    table = Liveness(LEASE)
    table.renewed("a", 1, now=0.0)
    table.renewed("b", 2, now=1.0)
    assert look_until(table, 0.0, 2.0) == []
    assert table.expired(now=62.0) == []
    table.renewed("a", 3, now=62.1)
    assert look_until(table, 63.0, 72.0) == ["b"]


beats = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.floats(0.0, 4.0)), max_size=60
)


@given(beats)
def test_the_table_agrees_with_a_dumb_dictionary_of_last_renewals(
    steps: list[tuple[str, int, float]],
) -> None:
    table = Liveness(LEASE)
    last: dict[str, tuple[int, float]] = {}
    now = 0.0
    for key, revision, pause in steps:
        now += pause
        ended = {key for key, (_, at) in last.items() if at + LEASE <= now}
        assert set(table.expired(now)) == ended
        for name in ended:
            del last[name]
        assert table.renewed(key, revision, now) == (key not in last)
        if key not in last or last[key][0] != revision:
            last[key] = (revision, now)
        table.check_integrity()
        assert len(table) == len(last)
