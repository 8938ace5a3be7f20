"""Host and disk beside an engine: what goes where, and what comes back from where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.engine import BLOCK, Engine, prompt

MakeEngine = Callable[..., Engine]

DISK = "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS"


@pytest.fixture
def on_disk(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Settings of an engine with a disk tier of 64 blocks."""

    def settings(**others: Any) -> dict[str, Any]:
        return {DISK: 64, "DYN_KVBM_DISK_CACHE_DIR": str(tmp_path)} | others

    return settings


Settings = Callable[..., dict[str, Any]]


def ask_again(engine: Engine, *texts: list[int]) -> list[int]:
    """Ask each with nothing on the device; how many tokens were loaded for each."""
    loaded = []
    for text in texts:
        engine.forget_device()
        asked = engine.ask(text)
        assert asked.answer == asked.text.generated(1)
        loaded.append(asked.loaded)
    return loaded


def test_without_the_filter_all_blocks_are_on_disk_when_the_host_has_evicted_them(
    make_engine: MakeEngine, on_disk: Settings
) -> None:
    engine = make_engine(slots=10, extra=on_disk(DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER="true"))
    for seed in range(3):
        engine.ask(prompt(41, seed))
    assert engine.core.tiers.disk is not None
    assert len(engine.core.tiers.disk) == 30
    assert ask_again(engine, prompt(41, 0), prompt(41, 1), prompt(41, 2)) == [40, 40, 40]


def test_with_the_filter_only_what_is_used_again_goes_to_disk(
    make_engine: MakeEngine, on_disk: Settings
) -> None:
    engine = make_engine(slots=10, extra=on_disk())
    assert engine.core.tiers.disk is not None
    engine.ask(prompt(41, 0))
    assert len(engine.core.tiers.disk) == 0
    assert ask_again(engine, prompt(41, 0)) == [40]
    assert len(engine.core.tiers.disk) == 10
    engine.ask(prompt(41, 1))  # takes the whole host tier
    assert ask_again(engine, prompt(41, 0)) == [40]


def test_with_disk_only_blocks_go_there_at_once(make_engine: MakeEngine, on_disk: Settings) -> None:
    engine = make_engine(slots=0, extra=on_disk())
    engine.ask(prompt(41))
    assert engine.core.tiers.disk is not None
    assert (len(engine.core.tiers.host), len(engine.core.tiers.disk)) == (0, 10)
    assert ask_again(engine, prompt(41)) == [40]


def test_a_prefix_is_put_together_from_host_and_disk(
    make_engine: MakeEngine, on_disk: Settings
) -> None:
    engine = make_engine(slots=20, extra=on_disk(DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER="1"))
    engine.ask(prompt(81))
    for block in engine.core.tiers.host.blocks()[1::2]:
        assert engine.core.tiers.host.drop(block)
    assert ask_again(engine, prompt(81)) == [80]
    assert engine.ranks[0].gate.loads.blocks == 80 // BLOCK // 2
