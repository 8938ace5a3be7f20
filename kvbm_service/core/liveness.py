"""Who is still beating: an observer's own table of leases.

The directory forgets a record whose owner stopped renewing it, but need not say so, and
cannot while it is itself away. So every observer keeps time for itself. A renewal is a
*new revision* of a record; hearing the same revision again (a re-read) proves nothing.
"""

from __future__ import annotations

from typing import NamedTuple

BLIND_LEASES = 0.5
"""An observer that did not look for this many leases was asleep itself."""


class _Heard(NamedTuple):
    revision: int
    at: float


class Liveness:
    """Keys with the time of their last renewal. A key lives for one lease after it."""

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self._heard: dict[str, _Heard] = {}
        """Least recently renewed first."""
        self._looked: float | None = None

    def renewed(self, key: str, revision: int, now: float) -> bool:
        """Note a record as it was read or announced. True if `key` was not alive before."""
        before = self._heard.get(key)
        if before is not None and before.revision == revision:
            return False
        self._heard.pop(key, None)
        self._heard[key] = _Heard(revision, now)
        return before is None

    def gone(self, key: str) -> bool:
        """`key` has left. True if it was alive before."""
        return self._heard.pop(key, None) is not None

    def expired(self, now: float) -> list[str]:
        """Drop and return the keys whose lease has ended. To be called several times per lease.

        An observer that did not call for a while (its process was stopped, its thread
        starved) has renewals waiting to be heard: its absence is added to everyone's lease.
        """
        self._excuse_absence(now)
        ended = []
        for key, heard in self._heard.items():
            if heard.at + self._lease_seconds > now:
                break
            ended.append(key)
        for key in ended:
            del self._heard[key]
        return ended

    def __contains__(self, key: str) -> bool:
        return key in self._heard

    def __len__(self) -> int:
        return len(self._heard)

    def _excuse_absence(self, now: float) -> None:
        absent = 0.0 if self._looked is None else now - self._looked
        self._looked = now
        if absent > self._lease_seconds * BLIND_LEASES:
            self._heard = {
                key: _Heard(heard.revision, min(now, heard.at + absent))
                for key, heard in self._heard.items()
            }

    def check_integrity(self) -> None:
        """Assert that the table is in the order in which leases end."""
        times = [heard.at for heard in self._heard.values()]
        assert times == sorted(times)
