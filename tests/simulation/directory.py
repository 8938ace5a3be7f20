"""The simulated directory: who takes part, under leases; and a watcher's view of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvbm_schemas.records import NodeRecord, RankRecord
from tests.simulation.timeline import Timeline

LEASE_SECONDS = 0.5
FIRST_EPOCH = 1_000


@dataclass
class Entry:
    """One node and its ranks."""

    record: NodeRecord
    ranks: tuple[RankRecord, ...]
    renewed: float


class Directory:
    """Forgets whoever does not renew in time."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._entries: dict[str, Entry] = {}
        self._epochs = [FIRST_EPOCH]

    def next_epoch(self, clock_went_back: bool) -> int:
        """Greater than any before; or less, where a clock went back."""
        epoch = min(self._epochs) - 1 if clock_went_back else max(self._epochs) + 1
        self._epochs.append(epoch)
        return epoch

    def leave(self, node: str, epoch: int) -> None:
        """Take part no longer."""
        entry = self._entries.get(node)
        if entry is not None and entry.record.epoch == epoch:
            del self._entries[node]

    def join(self, record: NodeRecord, ranks: tuple[RankRecord, ...]) -> bool:
        """Take part. False: the name is taken by a live record."""
        if record.node in self.live():
            return False
        self._entries[record.node] = Entry(record, ranks, self._timeline.now)
        return True

    def renew(self, node: str, epoch: int) -> bool:
        """Stay. False: the lease is lost."""
        entry = self.live().get(node)
        if entry is None or entry.record.epoch != epoch:
            return False
        entry.renewed = self._timeline.now
        return True

    def live(self) -> dict[str, Entry]:
        """Who takes part now."""
        oldest = self._timeline.now - LEASE_SECONDS
        self._entries = {n: e for n, e in self._entries.items() if e.renewed > oldest}
        return self._entries


Report = Callable[[str, Entry | None], None]


class Watcher:
    """What one place knows of the directory. Also forgets when it cannot look."""

    def __init__(self, directory: Directory, timeline: Timeline, report: Report) -> None:
        self._directory = directory
        self._timeline = timeline
        self._report = report
        self._known: dict[str, int] = {}
        self._looked = timeline.now

    def look(self, reachable: bool) -> None:
        """Report what changed since the last time."""
        now = self._timeline.now
        if reachable:
            self._looked = now
            live = self._directory.live()
        elif now - self._looked > LEASE_SECONDS:
            live = {}
        else:
            return
        for node in [node for node in self._known if node not in live]:
            del self._known[node]
            self._report(node, None)
        for node, entry in live.items():
            if self._known.get(node) != entry.record.epoch:
                self._known[node] = entry.record.epoch
                self._report(node, entry)
