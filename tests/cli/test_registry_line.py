"""The line in which a registry says how it is doing."""

from __future__ import annotations

from kvbm_service.cli.serve import _in_words
from kvbm_service.core.registry_counts import RegistryCounts
from kvbm_service.registry_service import RegistryStatus

STATUS = RegistryStatus(
    connected=True,
    scopes=1,
    nodes=2,
    syncing=0,
    blocks=1000,
    copies=1500,
    bytes_held=44_000,
    refused_blocks=0,
    counts=RegistryCounts(applied=7, lookups=1),
)


def test_it_says_what_is_known_and_done() -> None:
    assert _in_words(STATUS).endswith("2 nodes, 1,000 blocks (44 kB), 7 events, 1 lookup")


def test_it_says_what_was_refused_because_of_a_limit() -> None:
    counts = RegistryCounts(refused_nodes=1, refused_scopes=2, malformed=4)
    line = _in_words(STATUS._replace(refused_blocks=5, counts=counts))
    assert line.endswith(", 4 malformed, 3 nodes refused, 5 blocks refused")
