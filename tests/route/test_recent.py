"""What engines were sent lately."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvbm_schemas.block import BlockHash
from kvbm_service.route.recent import Recent

CHAINS = st.lists(st.lists(st.integers(0, 20), max_size=6, unique=True), max_size=12)


def names(numbers: list[int]) -> list[BlockHash]:
    return [BlockHash(number.to_bytes(16, "big")) for number in numbers]


def test_a_prefix_that_was_sent_is_found_up_to_where_prompts_part() -> None:
    recent = Recent()
    recent.sent(names([1, 2, 3]))
    assert recent.prefix(names([1, 2, 9, 3])) == 2
    assert recent.prefix(names([2, 3])) == 2
    assert recent.prefix(names([9])) == recent.prefix([]) == 0
    recent.forget()
    assert recent.prefix(names([1])) == 0


def test_what_was_sent_longest_ago_is_forgotten() -> None:
    recent = Recent(capacity=4)
    recent.sent(names([1, 2, 3]))
    recent.sent(names([7, 8]))
    assert recent.prefix(names([1, 2, 3])) == 2, "the tail goes before the head"
    assert recent.prefix(names([7, 8])) == 2


@given(CHAINS, st.integers(1, 10))
def test_it_never_holds_more_than_it_may_and_always_what_came_last(
    chains: list[list[int]], capacity: int
) -> None:
    recent = Recent(capacity)
    for chain in chains:
        recent.sent(names(chain))
        assert len(recent) <= capacity
        assert recent.prefix(names(chain)) == min(len(chain), capacity)
