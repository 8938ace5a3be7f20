"""The offload filter against the guides' sentence, taken word for word.

"Frequency is determined via doubling on cache hit (init with 1) and decrement by 1 on each
time decay step", and only blocks of frequency 2 or more go to disk.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvbm_schemas.block import BlockHash
from kvbm_service.core.offload_filter import HIGHEST_FREQUENCY, OffloadFilter

DECAY_SECONDS = 10.0

BLOCKS = [BlockHash(bytes([number]) * 16) for number in range(8)]
OFFERS = st.lists(st.tuples(st.lists(st.sampled_from(BLOCKS), max_size=6), st.integers(0, 25)))
"""Batches, and how many seconds later each comes."""
LEAST = st.integers(1, 9)


class Guides:
    """The sentence as a loop over all blocks at every step; forgets nothing for want of room."""

    def __init__(self, min_frequency: int) -> None:
        self.min_frequency = min_frequency
        self.frequency: dict[BlockHash, int] = {}
        self.seconds = 0

    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.seconds += 1
            if self.seconds % DECAY_SECONDS == 0:
                fallen = {block: count - 1 for block, count in self.frequency.items()}
                self.frequency = {block: count for block, count in fallen.items() if count > 0}

    def offer(self, block: BlockHash) -> bool:
        doubled = 2 * self.frequency.get(block, 0.5)
        self.frequency[block] = min(int(doubled), HIGHEST_FREQUENCY)
        return self.frequency[block] >= self.min_frequency


@given(OFFERS, LEAST)
def test_with_room_for_all_every_answer_is_that_of_the_guides(
    offers: list[tuple[list[BlockHash], int]], min_frequency: int
) -> None:
    ours, guides = OffloadFilter(min_frequency, DECAY_SECONDS), Guides(min_frequency)
    for batch, seconds in offers:
        guides.wait(seconds)
        expected = [guides.offer(block) for block in batch]
        assert ours.offer(batch, float(guides.seconds)) == expected
        known = {block: ours.frequency(block) for block in BLOCKS}
        assert known == {block: guides.frequency.get(block, 0) for block in BLOCKS}
        ours.check_integrity()


@given(OFFERS, LEAST, st.integers(1, 6))
def test_without_room_only_the_least_wanted_is_forgotten_and_only_for_a_newcomer(
    offers: list[tuple[list[BlockHash], int]], min_frequency: int, max_entries: int
) -> None:
    ours, guides = OffloadFilter(min_frequency, DECAY_SECONDS, max_entries), Guides(min_frequency)
    for batch, seconds in offers:
        guides.wait(seconds)
        for block in batch:
            before = dict(guides.frequency)
            expected = guides.offer(block)
            assert ours.offer([block], float(guides.seconds)) == [expected]
            lost = [one for one in guides.frequency if ours.frequency(one) == 0]
            if lost:
                (victim,) = lost
                assert block not in before, "room was needed for a newcomer"
                assert len(before) == max_entries, "there was no room"
                assert before[victim] == min(before.values()), "the victim was wanted least"
                del guides.frequency[victim]
            assert all(ours.frequency(one) == count for one, count in guides.frequency.items())
            assert len(ours) <= max_entries
            ours.check_integrity()
