"""Block leases: slots that another node may read until it lets go, or until time is up.

A lease protects the reader's luck, not its correctness: a slot whose lease has ended may be
reused at once, and a reader that was too slow finds that out from the slot's header.
"""

from __future__ import annotations

import heapq

MAX_LEASES = 4096
"""More open leases than this are refused."""


class LeaseTable:
    """Open leases by token, and when each ends."""

    def __init__(self) -> None:
        self._slots: dict[str, list[int]] = {}
        self._deadlines: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def full(self) -> bool:
        """Whether another lease would be one too many."""
        return len(self._slots) >= MAX_LEASES

    def grant(self, token: str, slots: list[int], deadline: float) -> None:
        """Open a lease on pinned `slots` until `deadline`."""
        assert token not in self._slots
        assert not self.full
        self._slots[token] = slots
        heapq.heappush(self._deadlines, (deadline, token))
        if len(self._deadlines) > 2 * MAX_LEASES:
            self._forget_released()

    def release(self, token: str) -> list[int]:
        """End a lease. Returns its slots; none if it is unknown or has ended already."""
        return self._slots.pop(token, [])

    def expire(self, now: float) -> list[list[int]]:
        """End the leases whose time is up. Returns the slots of each."""
        ended: list[list[int]] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, token = heapq.heappop(self._deadlines)
            slots = self._slots.pop(token, None)
            if slots is not None:
                ended.append(slots)
        return ended

    def end_all(self) -> list[list[int]]:
        """End every lease. Returns the slots of each."""
        ended = list(self._slots.values())
        self._slots.clear()
        self._deadlines.clear()
        return ended

    def _forget_released(self) -> None:
        self._deadlines = [entry for entry in self._deadlines if entry[1] in self._slots]
        heapq.heapify(self._deadlines)

    def check_integrity(self) -> None:
        """Every open lease will end."""
        waiting = {token for _, token in self._deadlines}
        assert set(self._slots) <= waiting, "a lease has no end"
        assert len(self._deadlines) <= 2 * MAX_LEASES, "ends of leases pile up"
