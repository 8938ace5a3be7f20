"""The oracles see planted bugs."""

from __future__ import annotations

import pytest

from tests.simulation.hand_over_mutants import HAND_OVER_MUTANTS
from tests.simulation.mutants import MUTANTS, Mutant
from tests.simulation.oracles import Broken
from tests.simulation.rank_mutants import RANK_MUTANTS
from tests.simulation.tier_mutants import TIER_MUTANTS
from tests.simulation.world import World

ALL = [*MUTANTS, *TIER_MUTANTS, *RANK_MUTANTS, *HAND_OVER_MUTANTS]

SEEDS = 200
"""A bug has to show within this many worlds."""


@pytest.mark.parametrize("mutant", ALL, ids=[mutant.name for mutant in ALL])
def test_a_planted_bug_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.plant(monkeypatch)
    said = []
    for seed in range(SEEDS):
        try:
            World(seed, mutant.weather).run()
        except Broken as broken:
            said.append(str(broken))
            if mutant.caught_by in said[-1]:
                return
    pytest.fail(f"nobody noticed that leaders or registries {mutant.name}; seen: {said}")


@pytest.mark.parametrize("mutant", ALL, ids=[mutant.name for mutant in ALL])
def test_without_the_bug_all_is_well_in_the_same_weather(mutant: Mutant) -> None:
    for seed in range(3):
        World(seed, mutant.weather).run()
