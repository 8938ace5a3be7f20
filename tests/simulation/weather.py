"""How large a simulated world is, and how bad things get in it."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Weather:
    """Rates are chances per message, per copy or per second of a node's life."""

    nodes: int = 2
    registries: int = 1
    world_size: int = 1
    host_slots: int = 8
    disk_slots: int = 0
    disk_only: bool = False
    filtered: bool = True
    prefetch_share: float = 0.0
    disk_slowness: float = 2.0
    """How many times longer a block takes there."""
    host_survives: bool = True
    """Whether host memory outlives its process."""
    device_blocks: int = 10
    running: int = 3
    """Requests that an engine has at a time; others wait."""
    hand_overs: float = 0.0
    """Share of the requests whose prompt one engine computes for another."""
    lent_blocks: int = 0
    """Device blocks that an engine may lend."""
    requests: int = 12
    longest_delay: float = 0.001
    """Of a message. Unequal delays put messages out of order."""
    copy_seconds: float = 0.001
    """For one block, at most."""
    lease_seconds: float = 0.3
    """Of leases on blocks."""
    loss: float = 0.0
    duplication: float = 0.0
    copy_failure: float = 0.0
    partitions: float = 0.0
    outages: float = 0.0
    stops: float = 0.0
    naps: float = 0.0
    """Chance that a rank stops for a while just as it is told to load, or in a save's midst."""
    crashes: float = 0.0
    rank_losses: float = 0.0
    """Of single ranks: killed, or stopped for so long that another takes its place."""
    unseen_ranks: float = 0.0
    """Of single ranks that do their work and are not in the directory for a while."""
    clock_jumps: float = 0.0
    """Chance that a life begins with a clock that went back."""
    registry_crashes: float = 0.0
    aborts: float = 0.02
    """Per request and step; so are preemptions."""
    preemptions: float = 0.02
    decay: float = 0.0
    """Of what is on disk. Per node and second; so are losses of a whole disk."""
    disk_losses: float = 0.0
    resets: float = 0.0
    """Per step."""

    @property
    def calm(self) -> bool:
        """Whether nothing can get lost and nobody stops."""
        return not (
            self.loss or self.copy_failure or self.partitions or self.outages or self.stops
            or self.naps or self.crashes or self.registry_crashes or self.decay
            or self.disk_losses or self.rank_losses or self.unseen_ranks
        )  # fmt: skip


RATES = (
    "loss", "duplication", "copy_failure", "partitions", "outages", "stops", "naps", "crashes",
    "registry_crashes", "decay", "disk_losses", "rank_losses", "unseen_ranks", "clock_jumps",
    "aborts", "preemptions", "resets",
)  # fmt: skip
"""What ends when the trouble is over."""


def any_weather(chance: random.Random) -> Weather:
    """Draw a world. Each kind of trouble is there in three of ten."""

    def sometimes(most: float) -> float:
        return chance.random() * most if chance.random() < 0.3 else 0.0

    return Weather(
        nodes=chance.choice((1, 2, 2, 3, 3, 4)),
        registries=chance.randint(1, 2),
        world_size=chance.choice((1, 1, 2)),
        host_slots=chance.choice((1, 4, 8, 16, 24)),
        disk_slots=chance.choice((0, 4, 12, 24, 40)),
        disk_only=chance.random() < 0.2,
        filtered=chance.random() < 0.5,
        prefetch_share=chance.choice((0.0, 0.25, 0.5)),
        disk_slowness=chance.choice((1.0, 2.0, 5.0)),
        host_survives=chance.random() < 0.6,
        device_blocks=chance.randint(6, 14),
        running=chance.choice((1, 2, 3)),
        requests=chance.randint(20, 80),
        longest_delay=chance.choice((0.0002, 0.001, 0.01)),
        copy_seconds=chance.choice((0.0002, 0.001, 0.01)),
        lease_seconds=chance.choice((0.1, 0.3)),
        loss=sometimes(0.3),
        duplication=sometimes(0.3),
        copy_failure=sometimes(0.1),
        partitions=sometimes(1.0),
        outages=sometimes(1.0),
        stops=sometimes(2.0),
        naps=sometimes(0.3),
        crashes=sometimes(2.0),
        registry_crashes=sometimes(0.7),
        decay=sometimes(10.0),
        disk_losses=sometimes(0.5),
        resets=sometimes(0.03),
        rank_losses=sometimes(2.0),
        unseen_ranks=sometimes(1.0),
        clock_jumps=sometimes(0.5),
        hand_overs=sometimes(0.7),
        lent_blocks=chance.choice((0, 4, 8)),
    )
