"""What the tiers say of a chain, checked block by block."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvbm_schemas.block import Tier
from kvbm_service.core.journal import Journal
from kvbm_service.core.tiers import Run, Tiers
from tests.core.builders import chain, survivors

NAMES = "abcdefghij"
PLACES = ("nowhere", "host", "disk", "both")


@st.composite
def anywhere(draw: st.DrawFn) -> tuple[str, str | None]:
    """What is in the host tier, and what on disk; None: there is no disk."""
    places = draw(st.lists(st.sampled_from(PLACES), min_size=len(NAMES), max_size=len(NAMES)))
    host = [name for name, place in zip(NAMES, places, strict=True) if place in ("host", "both")]
    disk = [name for name, place in zip(NAMES, places, strict=True) if place in ("disk", "both")]
    return "".join(host), "".join(disk) if draw(st.integers(0, 5)) else None


starts = st.integers(0, len(NAMES))


def tiers(host: str, disk: str | None) -> Tiers:
    """These blocks are in the host tier, those on disk; None: there is no disk."""
    made = Tiers(16, 0 if disk is None else 16, Journal())
    for tier, names in ((Tier.HOST, host), (Tier.DISK, disk or "")):
        made.adopt([survivors(tier, names, range(len(names)))])
    return made


def expected_runs(host: str, disk: str, start: int) -> list[Run]:
    """The same, one block at a time."""
    runs: list[Run] = []
    for at, name in list(enumerate(NAMES))[start:]:
        if name not in host + disk:
            break
        tier = Tier.HOST if name in host else Tier.DISK
        if runs and runs[-1].tier is tier:
            runs[-1] = runs[-1]._replace(end=at + 1)
        else:
            runs.append(Run(tier, at, at + 1))
    return runs


@given(anywhere(), starts)
def test_runs_follow_the_chain_to_its_first_gap_and_prefer_the_host(
    where: tuple[str, str | None], start: int
) -> None:
    host, disk = where
    assert tiers(host, disk).runs(chain(NAMES), start) == expected_runs(host, disk or "", start)


@given(anywhere(), starts)
def test_what_is_pinned_is_what_can_be_read(where: tuple[str, str | None], start: int) -> None:
    host, disk = where
    both = tiers(host, disk)
    runs = both.runs(chain(NAMES), start)
    pinned = both.pin_runs(chain(NAMES), start)
    assert [Run(piece.tier, piece.start, piece.end) for piece in pinned] == runs
    both.check_integrity()
    assert sum(status.pinned for status in both.status()) == sum(r.end - r.start for r in runs)
    for piece in pinned:
        assert len(both.fills(piece)) == len(piece.slots)
        both.unpin(piece.tier, piece.slots)
    assert not any(status.pinned for status in both.status())
    both.check_integrity()


@given(anywhere(), starts)
def test_absent_is_what_no_tier_has(where: tuple[str, str | None], start: int) -> None:
    host, disk = where
    here = host + (disk or "")
    expected = [at for at, name in enumerate(NAMES) if at >= start and name not in here]
    assert tiers(host, disk).absent(chain(NAMES), start) == expected


def test_in_a_disk_that_was_given_up_no_slot_has_a_stamp() -> None:
    both = tiers("", "ab")
    (pinned,) = both.pin_runs(chain("ab"), 0)
    both.give_up_disk()
    assert list(both.fills(pinned)) == [0, 0]
    both.unpin(pinned.tier, pinned.slots)
