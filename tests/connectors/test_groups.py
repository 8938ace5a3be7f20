"""Models whose layers do not all keep the same blocks: full attention beside sliding windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvbm_schemas.block import Tier
from tests.connectors.cluster import LiveRegistry, eventually
from tests.connectors.engine import BLOCK, Engine, full_attention, prompt, sliding_window
from tests.connectors.releases import needs_lost_requests
from tests.connectors.test_remote import meet, nothing_leased

MakeEngine = Callable[..., Engine]

pytestmark = needs_lost_requests

HYBRID = (full_attention(), sliding_window(), sliding_window())
ROOMY = {"blocks": 256}
"""A device pool of which saves may keep as much as they like. What is offered late for want of room
may have left a window, and is not saved then."""

NULL = 0
"""vLLM's null block."""


@pytest.mark.parametrize("verify", [False, True], ids=["", "verified"])
@pytest.mark.parametrize(
    "shape",
    [{}, {"ranks": 2}, {"overlapping": True}, {"batch_tokens": 12}],
    ids=["plain", "ranks", "overlapping", "chunked"],
)
def test_a_forgotten_prompt_is_loaded_into_all_groups(
    make_engine: MakeEngine, shape: dict[str, object], verify: bool
) -> None:
    engine = make_engine(**ROOMY, specs=HYBRID, verify=verify, **shape)
    engine.ask(prompt(41), tokens=9)
    assert len(engine.core.tiers.host) == 49 // BLOCK
    engine.forget_device()
    empty = engine.ranks[0].bytes_of(NULL)
    asked = engine.ask(prompt(41), tokens=9)
    assert (asked.loaded, asked.computed) == (40, 1 + 8)
    assert engine.ranks[0].bytes_of(NULL) == empty, "something was loaded into the null block"


def test_a_longer_prompt_goes_on_from_what_is_loaded(make_engine: MakeEngine) -> None:
    engine = make_engine(**ROOMY, specs=HYBRID)
    engine.ask(prompt(41))
    engine.forget_device()
    assert engine.ask(prompt(60)).loaded == 40
    engine.forget_device()
    assert engine.ask(prompt(60)).loaded == 56


def test_what_the_device_has_is_not_loaded_again(make_engine: MakeEngine) -> None:
    engine = make_engine(**ROOMY, specs=HYBRID)
    engine.ask(prompt(61))
    engine.forget_device()
    engine.ask(prompt(21))
    asked = engine.ask(prompt(61))
    assert (asked.loaded, asked.computed) == (60 - 20, 1)


def test_layers_with_nothing_but_windows_are_cached_too(make_engine: MakeEngine) -> None:
    engine = make_engine(specs=(sliding_window(),))
    engine.ask(prompt(41))
    engine.forget_device()
    asked = engine.ask(prompt(41))
    assert (asked.loaded, asked.computed) == (40, 1)


def test_a_block_that_a_window_has_let_go_of_is_not_saved(make_engine: MakeEngine) -> None:
    engine = make_engine(**ROOMY, specs=HYBRID)
    engine.ask(prompt(41))
    engine.connector.reset_cache()
    asked = engine.ask(prompt(61))  # finds its first 40 tokens on the device, but for the windows
    assert asked.computed == 21
    held = [name in engine.core.tiers.host for name in asked.names]
    gone = (40 - 2 * BLOCK + 1) // BLOCK
    assert held == [False] * gone + [True] * (15 - gone)
    engine.forget_device()
    assert engine.ask(prompt(61)).computed == 61
    engine.forget_device()
    assert engine.ask(prompt(61)).loaded == 60


def test_a_load_of_which_a_block_is_lost_is_computed_from_the_beginning(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(**ROOMY, specs=HYBRID)
    engine.ask(prompt(41))
    engine.forget_device()
    loads = engine.ranks[0].gate.loads
    loads.loses = 1
    asked = engine.ask(prompt(41))
    assert (asked.computed, loads.calls) == (41, 1)
    loads.loses = 0
    engine.forget_device()
    assert engine.ask(prompt(41)).loaded == 40


@pytest.mark.parametrize("broken", [0, 1])
def test_one_rank_that_cannot_read_makes_all_compute(make_engine: MakeEngine, broken: int) -> None:
    engine = make_engine(**ROOMY, specs=HYBRID, ranks=2)
    engine.ask(prompt(41))
    engine.forget_device()
    engine.ranks[broken].gate.loads.failing = True
    assert engine.ask(prompt(41)).computed == 41


def test_a_bit_that_flipped_is_found_in_a_part_that_is_loaded(make_engine: MakeEngine) -> None:
    engine = make_engine(**ROOMY, specs=HYBRID, verify=True)
    engine.ask(prompt(41))
    engine.forget_device()
    engine.ranks[0].flip_a_bit(0)
    assert engine.ask(prompt(41)).computed == 41


def test_blocks_come_from_disk(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine(
        **ROOMY,
        specs=HYBRID,
        slots=0,
        extra={
            "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": 64,
            "DYN_KVBM_DISK_CACHE_DIR": str(tmp_path),
        },
    )
    engine.ask(prompt(41))
    engine.forget_device()
    asked = engine.ask(prompt(41))
    assert (asked.loaded, asked.computed) == (40, 1)
    assert engine.ranks[0].disk_gate.loads.blocks == 10


def test_blocks_come_from_another_node(make_node: MakeEngine, registry: LiveRegistry) -> None:
    owner, reader = (make_node(name, **ROOMY, specs=HYBRID) for name in ("owner", "reader"))
    meet(owner, reader)
    owner.ask(prompt(41))
    eventually(lambda: registry.copies == 10)
    asked = reader.ask(prompt(41), tokens=5)
    assert (asked.loaded, asked.computed) == (40, 5)
    assert reader.ranks[0].gate.pulls.blocks == 10
    eventually(lambda: nothing_leased(owner))


def test_blocks_being_saved_stay_for_all_groups(make_engine: MakeEngine) -> None:
    engine = make_engine(**ROOMY, specs=HYBRID)
    saves = engine.ranks[0].gate.saves
    saves.close()
    asked = engine.submit(prompt(41))
    engine.until(lambda: asked.finished)
    free = engine.free_blocks
    assert free == engine.shape.blocks - 1 - 3 * 10
    for seed in range(1, 4):  # others need room meanwhile
        other = engine.submit(prompt(29, seed=seed))
        engine.until(lambda other=other: other.finished)
    saves.open()
    engine.run()
    engine.forget_device()
    assert engine.ask(prompt(41)).loaded == 40


def test_a_pool_that_is_far_too_small_never_shows_a_wrong_byte(make_engine: MakeEngine) -> None:
    engine = make_engine(specs=HYBRID, blocks=40, slots=24, batch_tokens=24)
    for turn in range(6):
        for seed in range(5):
            asked = [
                engine.submit(prompt(20 + 4 * turn + seed, seed=seed), tokens=7),
                engine.submit(prompt(37, seed=seed), tokens=3),
            ]
            engine.run()
            assert all(each.answer == each.text.generated(len(each.answer)) for each in asked)
        if turn % 2:
            engine.forget_device()
    assert engine.core.tiers.present == [Tier.HOST]
