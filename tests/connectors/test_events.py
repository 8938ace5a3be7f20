"""What vLLM's own event stream and statistics say about our tier."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from kvbm_connectors import vllm_events
from tests.connectors.cluster import eventually
from tests.connectors.engine import BLOCK, Engine, prompt
from tests.connectors.releases import needs_sources

MakeEngine = Callable[..., Engine]


def stored(engine: Engine) -> list[BlockStored]:
    return [e for e in engine.events if isinstance(e, BlockStored) and e.medium == "CPU"]


def removed(engine: Engine) -> list[BlockRemoved]:
    return [e for e in engine.events if isinstance(e, BlockRemoved) and e.medium == "CPU"]


@pytest.mark.parametrize("overlapping", [False, True], ids=["", "overlapping"])
def test_every_saved_block_is_announced(make_engine: MakeEngine, overlapping: bool) -> None:
    engine = make_engine(events=True, overlapping=overlapping)
    asked = engine.ask(prompt(21), lora="mine")
    hashes = [maybe_convert_block_hash(each) for each in asked.request.block_hashes]
    events = stored(engine)
    assert [event.block_hashes for event in events] == [[each] for each in hashes]
    assert [event.parent_block_hash for event in events] == [None, *hashes[:-1]]
    assert [token for event in events for token in event.token_ids] == prompt(20)
    assert {event.block_size for event in events} == {BLOCK}
    assert {event.lora_name for event in events} == {"mine"}


def test_blocks_saved_by_the_very_first_step_are_announced(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(events=True)
    (rank,) = engine.ranks
    begin_saves = rank.connector.wait_for_save

    def save_at_once() -> None:
        begin_saves()
        eventually(lambda: rank.unreported_moves)

    engine.submit(prompt(21))
    monkeypatch.setattr(rank.connector, "wait_for_save", save_at_once)
    engine.step()
    monkeypatch.undo()
    assert len(stored(engine)) == 5
    engine.run()


@pytest.mark.parametrize("overlapping", [False, True], ids=["", "overlapping"])
def test_a_subscriber_knows_exactly_what_the_host_tier_holds(
    make_engine: MakeEngine, overlapping: bool
) -> None:
    engine = make_engine(events=True, slots=12, overlapping=overlapping)
    for turn in range(12):
        engine.ask(prompt(30, seed=turn % 5), tokens=8)
        engine.forget_device()
    assert engine.announced() == engine.held_names()


def test_a_reset_takes_back_what_was_announced(make_engine: MakeEngine) -> None:
    engine = make_engine(events=True)
    engine.ask(prompt(21))
    engine.connector.reset_cache()
    engine.ask(prompt(3))
    announced = {each for event in stored(engine) for each in event.block_hashes}
    taken_back = {each for event in removed(engine) for each in event.block_hashes}
    assert announced == taken_back


def test_blocks_saved_right_after_a_reset_are_announced(make_engine: MakeEngine) -> None:
    engine = make_engine(events=True)
    engine.ask(prompt(21))
    engine.connector.reset_cache()
    engine.ask(prompt(21, seed=1))
    assert len(engine.held_names()) == 5
    assert engine.announced() == engine.held_names()


def test_without_subscribers_nothing_is_remembered(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.ask(prompt(21))
    assert not engine.events
    assert not engine.connector._scheduler_side._events._described


@needs_sources
def test_sources_of_loaded_tokens_add_up(make_engine: MakeEngine) -> None:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    engine = make_engine()
    engine.ask(prompt(41))
    engine.forget_device()
    loads = engine.ranks[0].gate.loads
    loads.close()
    asked = engine.submit(prompt(41))
    engine.until(lambda: loads.waiting)
    sources = engine.connector.get_external_cache_hit_sources(asked.request, 40)
    assert sources == {CacheHitSource.HOST: 40}
    surprise = engine.connector.get_external_cache_hit_sources(asked.request, 39)
    assert sum(surprise.values()) == 39
    loads.open()
    engine.run()


def test_so_many_blocks_are_described_and_older_ones_are_not_announced(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_events, "MAX_DESCRIBED", 3)
    engine = make_engine(events=True)
    asked = engine.ask(prompt(21))
    newest = [maybe_convert_block_hash(each) for each in asked.request.block_hashes[2:]]
    assert [event.block_hashes for event in stored(engine)] == [[each] for each in newest]
