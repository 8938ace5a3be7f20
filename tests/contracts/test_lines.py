"""Lines: what one sender may have waiting, and whose turn it is."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kvbm_service.adapters.lines import Lines


def test_whoever_sends_much_waits_for_itself() -> None:
    lines: Lines[str] = Lines(max_items=100, max_bytes=1000, share=0.5)
    for number in range(40):
        assert lines.put("loud", f"loud {number}", 1)
    assert lines.put("quiet", "quiet 0", 1)
    assert [lines.take() for _ in range(3)] == ["loud 0", "quiet 0", "loud 1"]


def test_one_sender_has_its_share_and_no_more() -> None:
    lines: Lines[int] = Lines(max_items=100, max_bytes=1000, share=0.5)
    assert [lines.put("loud", 0, 1) for _ in range(60)].count(True) == 50
    assert lines.put("quiet", 0, 1)
    assert lines.put("large", 0, 500)
    assert not lines.put("large", 0, 1)


def test_all_together_have_no_more_than_there_is() -> None:
    lines: Lines[int] = Lines(max_items=10, max_bytes=100, share=0.5)
    taken = [lines.put(sender, 0, 30) for sender in "abcd"]
    assert taken == [True, True, True, False]
    lines.take()
    assert lines.put("d", 0, 30)


@given(st.lists(st.one_of(st.none(), st.sampled_from("abc")), max_size=200))
def test_each_sender_is_served_in_order_and_nothing_is_lost_or_made_up(
    steps: list[str | None],
) -> None:
    lines: Lines[tuple[str, int]] = Lines(max_items=20, max_bytes=1000, share=0.5)
    put: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    for sender in steps:
        if sender is not None:
            put[sender] += lines.put(sender, (sender, put[sender]), 7)
        elif lines:
            who, number = lines.take()
            assert number == taken[who]
            taken[who] += 1
    assert len(lines) == put.total() - taken.total()
    assert all(put[who] - taken[who] <= 10 for who in put)
