"""Saves: what is held, what counts, and what happens when somebody is in the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.connectors.engine import BLOCK, Engine, prompt
from tests.connectors.releases import needs_patience

MakeEngine = Callable[..., Engine]


def test_an_engine_without_requests_steps_on_until_its_saves_are_done(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    saves = engine.ranks[0].gate.saves
    saves.close()
    asked = engine.submit(prompt(41))
    engine.until(lambda: asked.finished)
    for _ in range(5):
        engine.step()
    assert engine.scheduler.has_requests()
    saves.open()
    engine.run()
    assert len(engine.core.tiers.host) == 40 // BLOCK


def test_blocks_of_a_finished_request_stay_until_they_are_saved(make_engine: MakeEngine) -> None:
    engine = make_engine(blocks=12)
    saves = engine.ranks[0].gate.saves
    saves.close()
    first = engine.submit(prompt(21))
    engine.until(lambda: first.finished)
    assert engine.free_blocks == 11 - 20 // BLOCK
    second = engine.submit(prompt(40, seed=1))  # wants ten blocks, and six are free
    for _ in range(20):
        engine.step()
    assert not second.answer
    assert not second.computed
    saves.open()
    engine.run()
    assert second.answer == second.text.generated(1)
    engine.forget_device()
    assert engine.ask(prompt(21)).loaded == 20


def test_a_request_aborted_during_its_save_leaves_right_bytes(make_engine: MakeEngine) -> None:
    engine = make_engine(blocks=12)
    saves = engine.ranks[0].gate.saves
    saves.close()
    aborted = engine.submit(prompt(21), tokens=8)
    engine.until(lambda: aborted.answer)
    engine.wait(lambda: saves.waiting)
    engine.abort(aborted)
    other = engine.submit(prompt(40, seed=1))
    for _ in range(5):
        engine.step()
    saves.open()
    engine.run()
    assert other.answer == other.text.generated(1)
    engine.forget_device()
    assert engine.ask(prompt(21)).loaded == 20


def test_a_request_preempted_during_its_save_leaves_right_bytes(make_engine: MakeEngine) -> None:
    engine = make_engine(blocks=16)
    saves = engine.ranks[0].gate.saves
    saves.close()
    asked = engine.submit(prompt(21), tokens=8)
    engine.until(lambda: asked.answer)
    engine.wait(lambda: saves.waiting)
    with pytest.raises(RuntimeError, match="preempted"):  # which it could not: we hold blocks
        engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert asked.request.num_preemptions == 1
    other = engine.submit(prompt(24, seed=1))
    for _ in range(10):
        engine.step()
    saves.open()
    engine.run()
    for each, tokens in ((asked, 8), (other, 1)):
        assert each.answer == each.text.generated(tokens)
    engine.forget_device()
    assert engine.ask(prompt(21)).loaded == 20


@needs_patience
def test_nobody_is_preempted_while_saves_will_give_blocks_back(make_engine: MakeEngine) -> None:
    engine = make_engine(blocks=12)
    saves = engine.ranks[0].gate.saves
    saves.close()
    first = engine.submit(prompt(21))
    engine.until(lambda: first.finished)  # five of eleven blocks are held
    second = engine.submit(prompt(16, seed=1), tokens=20)
    for _ in range(30):
        engine.step()
    assert len(second.answer) == 9  # six blocks are full, and a seventh is wanted
    assert second.request.num_preemptions == 0
    saves.open()
    engine.run()
    assert second.answer == second.text.generated(20)
    assert second.request.num_preemptions == 0


@pytest.mark.parametrize("overlapping", [False, True], ids=["", "overlapping"])
def test_requests_that_preempt_each_other_all_get_their_answers(
    make_engine: MakeEngine, overlapping: bool
) -> None:
    engine = make_engine(blocks=14, overlapping=overlapping)
    asked = [engine.submit(prompt(14, seed), tokens=24) for seed in range(3)]
    engine.run()
    assert sum(each.request.num_preemptions for each in asked) > 0
    assert all(each.answer == each.text.generated(24) for each in asked)


def test_at_most_half_of_the_device_pool_is_held(make_engine: MakeEngine) -> None:
    engine = make_engine(blocks=32)
    saves = engine.ranks[0].gate.saves
    saves.close()
    asked = engine.submit(prompt(101))
    engine.until(lambda: asked.finished)
    assert engine.free_blocks == 31 - 32 // 2
    saves.open()
    engine.run()


def test_a_block_counts_only_when_every_rank_has_saved_it(make_engine: MakeEngine) -> None:
    engine = make_engine(ranks=2)
    fast, slow = (rank.gate.saves for rank in engine.ranks)
    slow.close()
    asked = engine.submit(prompt(41))
    engine.until(lambda: asked.finished and fast.blocks == 10)
    for _ in range(5):
        engine.step()
    assert len(engine.core.tiers.host) == 0
    slow.open()
    engine.run()
    assert len(engine.core.tiers.host) == 10


def test_a_block_that_one_rank_could_not_save_does_not_count(make_engine: MakeEngine) -> None:
    engine = make_engine(ranks=2)
    broken = engine.ranks[1].gate.saves
    broken.failing = True
    engine.ask(prompt(41))
    assert engine.core.tiers.host.used == 0
    engine.forget_device()
    broken.failing = False
    assert engine.ask(prompt(41)).loaded == 0
    engine.forget_device()
    assert engine.ask(prompt(41)).loaded == 40


def test_a_reset_forgets_everything(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.ask(prompt(41))
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert engine.core.tiers.host.used == 0
    assert engine.ask(prompt(41)).loaded == 0


def test_saves_under_way_do_not_come_back_after_a_reset(make_engine: MakeEngine) -> None:
    engine = make_engine()
    saves = engine.ranks[0].gate.saves
    saves.close()
    asked = engine.submit(prompt(41))
    engine.until(lambda: asked.finished)
    assert engine.connector.reset_cache()
    saves.open()
    engine.run()
    assert engine.core.tiers.host.used == 0
