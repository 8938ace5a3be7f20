"""Everything at once, at random: whatever happens, every byte attended to is right, and
nothing is left behind. A failure is its seed."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.cluster import LiveRegistry, eventually
from tests.connectors.engine import Asked, Engine

MakeEngine = Callable[..., Engine]

TURNS = 250
MAX_WAITING = 8
FEW_SEEDS = 2
BRANCHES, SEGMENT = 3, 14
"""Prompts are paths in a tree: most have a beginning in common with others."""


def seeds(count: int) -> list[Any]:
    """Seeds, of which every release has a few."""
    many = (pytest.param(seed, marks=pytest.mark.once) for seed in range(FEW_SEEDS, count))
    return [*range(FEW_SEEDS), *many]


def on_disk(folder: Path, dice: random.Random) -> dict[str, Any]:
    """Settings of a small disk tier."""
    return {
        "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": dice.randint(24, 200),
        "DYN_KVBM_DISK_CACHE_DIR": str(folder),
        "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": dice.random() < 0.5,
        "DYN_KVBM_MAX_TRANSFER_BATCH_SIZE": dice.choice([1, 4, 16]),
        "KVBM_PREFETCH_SHARE": dice.choice([0, 0.2, 1]),
    }


def at_rest(engine: Engine) -> bool:
    """No lease, no move, no pin."""
    tiers = engine.core.tiers
    assert tiers.disk is not None
    busy = engine.core.lending.leases or engine.core.orders.moves
    return not (busy or tiers.host.pinned or tiers.disk.pinned)


def random_prompt(dice: random.Random) -> list[int]:
    """A path of a random length, cut somewhere, with a tail of its own at times."""
    tokens: list[int] = []
    for level in range(dice.randint(1, 5)):
        branch = dice.randrange(BRANCHES) if level < 3 else 0
        tokens += [(level * 97 + branch * 13 + i * 7) % 500 for i in range(SEGMENT)]
    tokens = tokens[: dice.randint(1, len(tokens))]
    return tokens + [dice.randrange(500) for _ in range(dice.choice([0, 0, 3]))]


class Storm:
    """One engine and what befalls it."""

    def __init__(self, engine: Engine, dice: random.Random, *, pulls_fail: bool) -> None:
        self.engine = engine
        self._dice = dice
        gates = [rank.gate for rank in engine.ranks]
        own = [valve for gate in gates for valve in (gate.saves, gate.loads)]
        others = [valve for gate in gates for valve in (gate.pulls, gate.fetches)]
        if engine.core.tiers.disk is not None:
            disks = [rank.disk_gate for rank in engine.ranks]
            own += [valve for disk in disks for valve in (disk.writes, disk.loads, disk.fetches)]
        self._valves = own + others
        self._fragile = own + (others if pulls_fail else [])
        self._asked: list[Asked] = []
        self._deeds: list[tuple[Callable[[], None], float]] = [
            (self._submit, 0.35),
            (self._abort, 0.05),
            (self._turn_a_valve, 0.15),
            (self._break_something, 0.05),
            (self._mend_everything, 0.05),
            (self._reset_device, 0.04),
            (self._reset_everything, 0.01),
            (self._preempt_everybody, 0.02),
            (self._wait_a_little, 0.1),
        ]

    def turn(self) -> None:
        """Something happens, and the engine takes a step."""
        for deed, chance in self._deeds:
            if self._dice.random() < chance:
                deed()
        self.engine.step()
        self.engine.check_integrity()

    def end(self) -> None:
        """The sun comes out, and all have been served."""
        self._mend_everything()
        self.engine.run()
        for asked in self._asked:
            assert asked.finished
            assert asked.answer == asked.text.generated(len(asked.answer))

    def _outstanding(self) -> list[Asked]:
        return [asked for asked in self._asked if not asked.finished]

    def _submit(self) -> None:
        if len(self._outstanding()) < MAX_WAITING:
            salt = self._dice.choice([None, None, None, "a tenant"])
            tokens = self._dice.choice([1, 1, 6, 20])
            self._asked.append(self.engine.submit(random_prompt(self._dice), tokens, salt=salt))

    def _abort(self) -> None:
        if outstanding := self._outstanding():
            self.engine.abort(self._dice.choice(outstanding))

    def _turn_a_valve(self) -> None:
        valve = self._dice.choice(self._valves)
        if self._dice.random() < 0.4:
            valve.close()
        else:
            valve.open()

    def _break_something(self) -> None:
        valve = self._dice.choice(self._fragile)
        if self._dice.random() < 0.5:
            valve.failing = True
        else:
            valve.loses = self._dice.randint(1, 3)

    def _mend_everything(self) -> None:
        for valve in self._valves:
            valve.failing, valve.loses = False, 0
            valve.open()

    def _reset_device(self) -> None:
        self.engine.scheduler.reset_prefix_cache()

    def _reset_everything(self) -> None:
        self.engine.scheduler.reset_prefix_cache(reset_connector=True)

    def _preempt_everybody(self) -> None:
        with contextlib.suppress(RuntimeError):  # saves or loads hold blocks; preempted they are
            self.engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    def _wait_a_little(self) -> None:
        time.sleep(0.002)


@pytest.mark.parametrize("overlapping", [False, True], ids=["", "overlapping"])
@pytest.mark.parametrize("seed", seeds(8))
def test_an_engine_in_a_storm_computes_from_right_bytes_and_leaks_nothing(
    make_engine: MakeEngine, seed: int, overlapping: bool
) -> None:
    dice = random.Random(seed)
    engine = make_engine(
        blocks=dice.randint(27, 40),
        slots=dice.randint(32, 150),
        ranks=1 + seed % 2,
        batch_tokens=dice.choice([16, 40, 512]),
        overlapping=overlapping,
        verify=dice.random() < 0.5,
        events=True,
    )
    storm = Storm(engine, dice, pulls_fail=True)
    for _ in range(TURNS):
        storm.turn()
    storm.end()
    assert engine.announced() == engine.held_names()
    gate = engine.ranks[0].gate
    assert gate.saves.blocks > 20
    assert gate.loads.blocks > 0


@pytest.mark.parametrize("slots", [0, pytest.param(12, marks=pytest.mark.once), 40])
@pytest.mark.parametrize("seed", seeds(4))
def test_host_and_disk_in_a_storm_give_right_bytes_and_leak_nothing(
    make_engine: MakeEngine, tmp_path: Path, seed: int, slots: int
) -> None:
    dice = random.Random(seed)
    engine = make_engine(
        blocks=dice.randint(27, 40),
        slots=slots,
        ranks=1 + seed % 2,
        batch_tokens=dice.choice([16, 40, 512]),
        overlapping=seed >= 2,
        extra=on_disk(tmp_path, dice),
    )
    storm = Storm(engine, dice, pulls_fail=True)
    for _ in range(TURNS):
        storm.turn()
    storm.end()
    assert engine.core.tiers.disk is not None, "no valve breaks a disk for good"
    gate = engine.ranks[0].disk_gate
    assert gate.writes.blocks > 0
    assert gate.loads.blocks + gate.fetches.blocks > 0 or slots == 40


@pytest.mark.parametrize("seed", seeds(3))
def test_engines_with_disks_in_a_storm_read_from_each_other(
    make_node: MakeEngine, registry: LiveRegistry, tmp_path: Path, seed: int
) -> None:
    dice = random.Random(seed)
    storms = [
        Storm(
            make_node(
                name,
                blocks=40,
                slots=dice.choice([0, 20, 40]),
                overlapping=seed % 2 == 1,
                extra={"KVBM_LOOKUP_DEADLINE_MS": 50} | on_disk(tmp_path / name, dice),
            ),
            dice,
            pulls_fail=False,
        )
        for name in ("one", "two")
    ]
    for storm in storms:
        eventually(lambda storm=storm: storm.engine.core.peers.online)
    for _ in range(TURNS):
        for storm in storms:
            storm.turn()
    for storm in storms:
        storm.end()
    engines = [storm.engine for storm in storms]
    for engine in engines:
        eventually(lambda engine=engine: (engine.step(), at_rest(engine))[-1])
    assert sum(engine.ranks[0].gate.pulls.blocks for engine in engines) > 0
    assert sum(engine.ranks[0].disk_gate.fetches.blocks for engine in engines) > 0


@pytest.mark.parametrize("seed", seeds(3))
def test_engines_in_a_storm_read_from_each_other(
    make_node: MakeEngine, registry: LiveRegistry, seed: int
) -> None:
    dice = random.Random(seed)
    names = ("one", "two")
    storms = [
        Storm(
            make_node(
                name,
                blocks=40,
                slots=dice.randint(10, 60),
                overlapping=seed % 2 == 1,
                extra={"KVBM_LOOKUP_DEADLINE_MS": 50},
            ),
            dice,
            pulls_fail=False,  # a node that failed is left alone for longer than this storm lasts
        )
        for name in names
    ]
    for storm in storms:
        eventually(lambda storm=storm: storm.engine.core.peers.online)
    for _ in range(TURNS):
        for storm in storms:
            storm.turn()
    for storm in storms:
        storm.end()
    for storm in storms:
        eventually(lambda storm=storm: not storm.engine.core.tiers.host.pinned)
    assert sum(storm.engine.ranks[0].gate.pulls.blocks for storm in storms) > 0
