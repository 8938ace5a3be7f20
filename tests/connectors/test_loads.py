"""Loads: late, failing, unwanted."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.connectors.engine import Engine, prompt

MakeEngine = Callable[..., Engine]


def with_a_lost_prompt(make_engine: MakeEngine, **shape: object) -> Engine:
    """An engine whose host tier has `prompt(41)`, and whose device has nothing."""
    engine = make_engine(**shape)
    engine.ask(prompt(41))
    engine.forget_device()
    return engine


@pytest.mark.parametrize("overlapping", [False, True], ids=["", "overlapping"])
def test_others_are_served_during_a_load(make_engine: MakeEngine, overlapping: bool) -> None:
    engine = with_a_lost_prompt(make_engine, overlapping=overlapping)
    loads = engine.ranks[0].gate.loads
    loads.close()
    waiting = engine.submit(prompt(41))
    other = engine.submit(prompt(20, seed=1), tokens=9)
    engine.until(lambda: other.finished and loads.waiting)
    assert other.answer == other.text.generated(9)
    assert not waiting.answer
    loads.open()
    engine.run()
    assert waiting.answer == waiting.text.generated(1)
    assert waiting.computed == 1


def test_blocks_that_did_not_arrive_are_computed(make_engine: MakeEngine) -> None:
    engine = with_a_lost_prompt(make_engine)
    loads = engine.ranks[0].gate.loads
    loads.loses = 3
    asked = engine.ask(prompt(41))
    assert (asked.loaded, asked.computed) == (40, 1 + 3 * 4)
    assert loads.calls == 1


def test_when_nothing_arrives_the_prompt_is_computed(make_engine: MakeEngine) -> None:
    engine = with_a_lost_prompt(make_engine)
    loads = engine.ranks[0].gate.loads
    loads.failing = True
    asked = engine.ask(prompt(41))
    assert asked.computed == 41
    assert loads.calls == 1


def test_a_block_that_could_not_be_read_is_saved_anew(make_engine: MakeEngine) -> None:
    engine = with_a_lost_prompt(make_engine)
    loads = engine.ranks[0].gate.loads
    loads.failing = True
    engine.ask(prompt(41))
    loads.failing = False
    engine.forget_device()
    assert engine.ask(prompt(41)).loaded == 40
    assert engine.ranks[0].gate.saves.blocks == 20


@pytest.mark.parametrize("broken", [0, 1])
def test_one_rank_that_cannot_read_makes_all_compute(make_engine: MakeEngine, broken: int) -> None:
    engine = with_a_lost_prompt(make_engine, ranks=2)
    engine.ranks[broken].gate.loads.loses = 2
    asked = engine.ask(prompt(41))
    assert asked.computed == 1 + 2 * 4


def test_ranks_that_fail_at_different_times_and_places_are_all_believed(
    make_engine: MakeEngine,
) -> None:
    engine = with_a_lost_prompt(make_engine, ranks=2)
    first, second = (rank.gate.loads for rank in engine.ranks)
    first.loses, second.loses = 2, 5
    second.close()
    asked = engine.submit(prompt(41))
    engine.until(lambda: first.blocks)
    for _ in range(5):
        engine.step()
    second.open()
    engine.run()
    assert asked.answer == asked.text.generated(1)
    assert asked.computed == 1 + 5 * 4


def test_a_flipped_bit_in_the_host_tier_is_noticed(make_engine: MakeEngine) -> None:
    engine = with_a_lost_prompt(make_engine, verify=True)
    engine.ranks[0].flip_a_bit(slot=3)
    asked = engine.ask(prompt(41))
    assert asked.loaded == 40
    assert asked.computed > 1


def test_a_slot_that_holds_something_else_is_noticed(make_engine: MakeEngine) -> None:
    engine = with_a_lost_prompt(make_engine)
    engine.ranks[0].slab.headers["fill"] += 1
    asked = engine.ask(prompt(41))
    assert asked.computed == 41


def test_a_failed_load_fails_the_request_where_the_operator_wants_that(
    make_engine: MakeEngine,
) -> None:
    engine = with_a_lost_prompt(make_engine, policy="fail")
    engine.ranks[0].gate.loads.failing = True
    asked = engine.submit(prompt(41))
    engine.run()
    assert asked.finished
    assert not asked.answer


def test_a_request_aborted_while_it_waits_for_room_lets_its_blocks_go(
    make_engine: MakeEngine,
) -> None:
    engine = with_a_lost_prompt(make_engine, blocks=22)
    first = engine.submit(prompt(45, seed=1), tokens=8)
    engine.until(lambda: first.answer)
    second = engine.submit(prompt(41))
    engine.until(lambda: engine.core.tiers.host.pinned == 10)
    engine.step()
    assert not engine.ranks[0].gate.loads.calls
    engine.abort(second)
    assert engine.core.tiers.host.pinned == 0
    engine.run()


def test_a_request_aborted_during_its_load_keeps_its_blocks_until_the_load_is_over(
    make_engine: MakeEngine,
) -> None:
    engine = with_a_lost_prompt(make_engine)
    loads = engine.ranks[0].gate.loads
    loads.close()
    asked = engine.submit(prompt(41))
    engine.until(lambda: loads.waiting)
    engine.abort(asked)
    for _ in range(5):
        engine.step()
    assert engine.free_blocks < engine.shape.blocks - 1
    loads.open()
    engine.run()
    assert engine.free_blocks == engine.shape.blocks - 1
    engine.forget_device()
    assert engine.ask(prompt(41)).loaded == 40


def test_a_request_aborted_during_a_load_that_fails_leaves_nothing(
    make_engine: MakeEngine,
) -> None:
    engine = with_a_lost_prompt(make_engine, ranks=2)
    for rank in engine.ranks:
        rank.gate.loads.close()
        rank.gate.loads.failing = True
    asked = engine.submit(prompt(41))
    engine.until(lambda: all(rank.gate.loads.waiting for rank in engine.ranks))
    engine.abort(asked)
    for rank in engine.ranks:
        rank.gate.loads.open()
    engine.run()


def test_a_request_preempted_after_its_load_loads_again(make_engine: MakeEngine) -> None:
    engine = with_a_lost_prompt(make_engine)
    asked = engine.submit(prompt(41), tokens=40)
    engine.until(lambda: len(asked.answer) == 2)
    while engine.core.busy:  # what is being saved cannot be reset
        engine.settle()
        engine.step()
    before = engine.ranks[0].gate.loads.calls
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.run()
    assert asked.request.num_preemptions == 1
    assert asked.answer == asked.text.generated(40)
    assert engine.ranks[0].gate.loads.calls > before


def test_what_is_being_read_is_not_evicted(make_engine: MakeEngine) -> None:
    engine = with_a_lost_prompt(make_engine, slots=10)
    loads = engine.ranks[0].gate.loads
    loads.close()
    asked = engine.submit(prompt(41))
    engine.until(lambda: loads.waiting)
    other = engine.submit(prompt(61, seed=1))
    engine.until(lambda: other.finished)
    assert engine.core.tiers.host.pinned == 10
    loads.open()
    engine.run()
    assert asked.answer == asked.text.generated(1)
    assert asked.computed == 1


def test_what_a_slow_rank_is_still_reading_is_not_evicted(make_engine: MakeEngine) -> None:
    engine = with_a_lost_prompt(make_engine, ranks=2, slots=10)
    fast, slow = (rank.gate.loads for rank in engine.ranks)
    slow.close()
    asked = engine.submit(prompt(41))
    engine.until(lambda: fast.blocks == 10 and slow.waiting)
    other = engine.submit(prompt(61, seed=1))
    engine.until(lambda: other.finished)
    assert engine.core.tiers.host.pinned == 10
    slow.open()
    engine.run()
    assert asked.computed == 1


def test_a_block_that_only_the_slower_rank_could_not_read_is_forgotten(
    make_engine: MakeEngine,
) -> None:
    engine = with_a_lost_prompt(make_engine, ranks=2)
    fast, slow = (rank.gate.loads for rank in engine.ranks)
    slow.close()
    slow.failing = True
    asked = engine.submit(prompt(41))
    engine.until(lambda: fast.blocks == 10 and slow.waiting)
    for _ in range(5):
        engine.step()
    slow.open()
    engine.until(lambda: not engine.core.busy)
    assert len(engine.core.tiers.host) == 0
    engine.run()
    assert asked.computed == 41


def test_a_reset_during_a_load_spoils_nothing(make_engine: MakeEngine) -> None:
    engine = with_a_lost_prompt(make_engine)
    loads = engine.ranks[0].gate.loads
    loads.close()
    asked = engine.submit(prompt(41))
    engine.until(lambda: loads.waiting)
    engine.connector.reset_cache()
    other = engine.submit(prompt(200, seed=1))
    engine.until(lambda: other.finished)
    loads.open()
    engine.run()
    assert asked.answer == asked.text.generated(1)
