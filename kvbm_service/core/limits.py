"""How long a leader's core waits, and how much it takes on."""

from __future__ import annotations

from typing import NamedTuple

from kvbm_service.core.spills import SpillLimits


class Limits(NamedTuple):
    """How long and how much."""

    lookup_seconds: float = 0.02
    """For each of the two questions, to the registry and to the owners. 0: never ask."""
    lease_seconds: float = 30.0
    transfer_seconds: float = 10.0
    held_blocks: int = 1024
    """Device blocks that unfinished saves may keep from the engine."""
    lent_blocks: int = 512
    """Device blocks that may be lent to decode engines at a time. 0: none is."""
    staging_seconds: float = 0.2
    """How much longer an owner may take whose blocks are on its disk."""
    hand_over_seconds: float = 2.0
    """How much longer an owner may take that hands blocks over. Its engine may be in the midst of
    a long step, and all of the prompt would have to be computed again."""
    disk_only: bool = False
    """Save to disk at once; the host tier only serves other nodes."""
    min_priority: int = 0
    """A request's blocks are saved up to the first whose priority is lower."""
    spill: SpillLimits = SpillLimits()
    min_frequency: int = 2
    """How often a block must have been used to go to disk. 0: all go."""
    decay_seconds: float = 600.0
    filter_entries: int = 1_000_000
    prefetch_share: float = 0.125
    """How much of the host tier may be filled for requests that wait."""
