"""Many small worlds, each from one seed. A failure names its seed and how to replay it."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

import pytest

from tests.simulation.weather import Weather
from tests.simulation.world import World

SEEDS = int(os.environ.get("SIMULATION_SEEDS", "520"))
"""More of them: SIMULATION_SEEDS=20000 pytest tests/simulation"""
GROUPS = 8
CALM = Weather(nodes=3, registries=2, host_slots=16, requests=60)


@pytest.mark.parametrize("group", range(GROUPS))
def test_all_is_well_in_any_world(group: int) -> None:
    for seed in range(group, SEEDS, GROUPS):
        World(seed).run()


@pytest.mark.parametrize(
    "weather",
    [CALM, replace(CALM, duplication=0.3), replace(CALM, world_size=2), replace(CALM, resets=0.1)],
    ids=["calm", "duplicates", "two ranks", "resets"],
)
def test_on_a_perfect_network_nobody_resyncs_in_vain(weather: Weather) -> None:
    for seed in range(10):
        world = World(seed, weather)
        assert world.trouble.calm
        world.run()
        assert world.network.sent["Resync"] <= weather.nodes * weather.registries


def test_the_same_seed_gives_the_same_world() -> None:
    def told(seed: int) -> tuple[object, ...]:
        world = World(seed)
        world.run()
        return world.weather, world.network.sent, world.blocks, world.chance.random()

    assert [told(seed) for seed in range(5)] == [told(seed) for seed in range(5)]


def test_the_worlds_are_eventful() -> None:
    """Oracles prove nothing about what never happens."""
    happened: Counter[str] = Counter()
    for seed in range(70):
        world = World(seed)
        world.run()
        happened.update(world.network.sent)
        happened.update(world.blocks)
        happened.update(world.told)
        happened.update(f"adopted in {tier}" for tier in world.adopted.elements())
        happened["unheard"] += world.unheard
        happened["expired"] += world.expired_leases
        happened["restarts"] += world.restarts
    assert happened["own"] > 500
    assert happened["remote"] > 200
    for rare in (
        "failed", "expired", "restarts", "Resync", "Cleared", "Release", "spills", "disk loads",
        "fetches", "fetches by bus", "adopted in G2", "adopted in G3",
    ):  # fmt: skip
        assert happened[rare] > 20, rare
    for rarest in (
        "remote fetches", "unheard", "lost disks", "salvages", "salvaged blocks", "leases in G1",
        "reads of G1",
    ):  # fmt: skip
        assert happened[rarest] > 3, rarest
