"""A leader's own events."""

from __future__ import annotations

import pytest

from kvbm_schemas.block import Tier, pack
from kvbm_schemas.events import Beat, Cleared, Removed, Stored
from kvbm_service.core import journal as journal_module
from kvbm_service.core.journal import Journal
from tests.core.builders import chain


def begun(empty: bool = True) -> Journal:
    journal = Journal()
    journal.begin(7, empty=empty)
    return journal


def test_events_are_numbered_from_one_in_their_epoch() -> None:
    journal = begun()
    journal.stored(chain("ab"))
    journal.removed(chain("a"))
    journal.cleared()
    assert journal.take() == [
        Stored(epoch=7, seq=1, tier=Tier.HOST, hashes=pack(chain("ab"))),
        Removed(epoch=7, seq=2, tier=Tier.HOST, hashes=pack(chain("a"))),
        Cleared(epoch=7, seq=3),
    ]
    assert journal.take() == []


def test_a_beat_names_the_last_event() -> None:
    journal = begun()
    assert journal.beat() == Beat(epoch=7, seq=0)
    journal.stored(chain("a"))
    assert journal.beat() == Beat(epoch=7, seq=1)


def test_a_life_that_begins_with_blocks_begins_with_an_event_that_nobody_heard() -> None:
    journal = begun(empty=False)
    assert journal.beat() == Beat(epoch=7, seq=1)
    assert journal.take() == []


def test_a_new_life_starts_counting_anew_and_says_nothing_of_the_old_one() -> None:
    journal = begun()
    journal.stored(chain("a"))
    journal.begin(8, empty=True)
    assert journal.take() == []
    journal.stored(chain("b"))
    assert journal.take() == [Stored(epoch=8, seq=1, tier=Tier.HOST, hashes=pack(chain("b")))]


def test_a_life_cannot_begin_twice() -> None:
    journal = begun()
    with pytest.raises(AssertionError):
        journal.begin(7, empty=True)


def test_dropped_events_leave_a_gap_in_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "MAX_UNSENT_EVENTS", 2)
    journal = begun()
    for name in "abcd":
        journal.stored(chain(name))
    assert [event.seq for event in journal.take()] == [3, 4]
    assert journal.dropped == 2
    journal.stored(chain("e"))
    assert [event.seq for event in journal.take()] == [5]


def test_a_long_list_becomes_several_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "MAX_BATCH_BLOCKS", 2)
    journal = begun()
    journal.stored(chain("abcde"))
    events = journal.take()
    assert [event.seq for event in events] == [1, 2, 3]
    assert [e.hashes for e in events if isinstance(e, Stored)] == [
        pack(chain("ab")),
        pack(chain("cd")),
        pack(chain("e")),
    ]
    journal.removed([])
    assert journal.take() == []
