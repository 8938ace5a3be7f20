"""Each kind of fault once, by itself, under load: nothing wrong, late or lost, and all heals."""

from __future__ import annotations

import pytest

from tests.chaos.arena import Arena
from tests.chaos.fault import FAULTS, Fault
from tests.chaos.load import Load
from tests.chaos.schedule import Planned
from tests.chaos.trial import suffer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

SECONDS = 8.0
"""Longer than the lease on a membership; those that need no such time take their shortest."""
LASTING = ("leader stopped", "NATS stopped", "nothing gets in", "nothing gets out")
NOTICED_SECONDS = 10.0
"""By then, a node has wanted to write to its disk."""


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_fault_costs_time_and_nothing_else(arena: Arena, load: Load, fault: Fault) -> None:
    victims = fault.victims(arena)
    if not victims:
        pytest.skip(f"nobody here can be struck: {fault.name}")
    seconds = SECONDS if fault.name in LASTING else fault.shortest_seconds
    if fault.says:
        seconds = NOTICED_SECONDS
    result = suffer(arena, load, (Planned(0.0, fault.name, victims[-1], seconds),))
    print(f"{fault.name}: {result.heal_seconds_max:.1f} s to heal; {result.untruths}")
    assert result.problems == []
    if fault.says:
        assert fault.says in arena.members[victims[-1]].node.log
    assert (result.wrong, result.stalls, result.leaks) == (0, 0, 0)
    assert result.requests > 0
    assert result.heal_seconds_max <= fault.heal_seconds
