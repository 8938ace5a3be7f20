"""What the network does to packets, and what it has done."""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class Line(msgspec.Struct, frozen=True):
    """What happens to packets from one host to another: one direction. They keep their order."""

    cut: bool = False
    delay_seconds: float = 0.0
    jitter_seconds: float = 0.0
    """Up to so much more delay, drawn anew for each packet."""
    loss: float = 0.0
    """The share of packets that is dropped at random."""
    bytes_per_second: float = 0.0
    """0: no limit."""


class Traffic(NamedTuple):
    """What one direction has carried, in packets."""

    passed: int
    dropped: int
