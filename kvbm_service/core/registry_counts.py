"""What a registry has seen and done, in numbers. Whoever exports metrics reads them from here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RegistryCounts:
    """All of these only grow."""

    applied: int = 0
    """Events applied, replayed ones included."""
    seen: int = 0
    """Events dropped because they, or a later state, had been applied already."""
    stale: int = 0
    """Events and snapshots of another life of their node than the directory lists, dropped."""
    buffered: int = 0
    """Events kept until a snapshot fills the gap before them."""
    overflows: int = 0
    """Times that the buffered events of a node were too many, and forgotten."""
    resyncs: int = 0
    """Times that a snapshot was asked for, joining nodes and repeated questions included."""
    snapshots: int = 0
    """Snapshots that took the place of what was known."""
    late_snapshots: int = 0
    """Chunks of snapshots that tell nothing new, dropped."""
    oversized_snapshots: int = 0
    """Snapshots with more blocks than a node may have, dropped."""
    unknown_sender: int = 0
    """Events and snapshots of nodes that are no members, dropped."""
    refused_nodes: int = 0
    """Nodes ignored because their scope had as many as it may."""
    refused_scopes: int = 0
    """Nodes ignored because there were as many scopes as there may be."""
    malformed: int = 0
    """Messages and records that could not be read. Nothing was changed by them."""
    oversized_answers: int = 0
    """Answers larger than a message may be. Nothing was sent."""
    lookups: int = 0
    """Questions answered: who has the longest prefix."""
    locates: int = 0
    """Questions answered: who has these blocks."""
