"""Blocks that the device has lost come back from the node's own host tier."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.connectors.engine import BLOCK, Engine, prompt

MakeEngine = Callable[..., Engine]


@pytest.fixture(params=[False, True], ids=["", "overlapping"])
def engine(make_engine: MakeEngine, request: pytest.FixtureRequest) -> Engine:
    return make_engine(overlapping=request.param)


def test_a_prompt_comes_back_after_the_device_has_lost_it(engine: Engine) -> None:
    first = engine.ask(prompt(41), tokens=3)
    assert (first.loaded, first.computed) == (0, 43)
    engine.forget_device()
    again = engine.ask(prompt(41), tokens=3)
    assert (again.loaded, again.computed) == (40, 3)
    assert engine.ranks[0].gate.loads.blocks == 40 // BLOCK


def test_another_prompt_is_a_miss(engine: Engine) -> None:
    engine.ask(prompt(41))
    engine.forget_device()
    other = engine.ask(prompt(41, seed=1))
    assert (other.loaded, other.computed) == (0, 41)
    assert engine.ranks[0].gate.loads.calls == 0


def test_a_common_beginning_is_loaded_and_the_rest_computed(engine: Engine) -> None:
    engine.ask(prompt(40))
    engine.forget_device()
    longer = engine.ask(prompt(30) + prompt(30, seed=1))
    assert (longer.loaded, longer.computed) == (28, 32)


def test_a_prompt_that_is_cached_to_its_end_still_computes_its_last_token(engine: Engine) -> None:
    engine.ask(prompt(40))
    engine.forget_device()
    again = engine.ask(prompt(40))
    assert (again.loaded, again.computed) == (36, 4)


def test_what_the_device_still_has_is_not_loaded(engine: Engine) -> None:
    engine.ask(prompt(61))
    engine.forget_device()
    engine.ask(prompt(20))
    loads = engine.ranks[0].gate.loads
    before = loads.blocks
    whole = engine.ask(prompt(61))
    assert whole.computed == 1
    assert (loads.blocks - before) * BLOCK == whole.loaded == 60 - 20


def test_generated_blocks_are_saved_too(engine: Engine) -> None:
    first = engine.ask(prompt(10), tokens=15)
    engine.forget_device()
    conversation = prompt(10) + first.answer
    again = engine.ask([*conversation, 7])
    assert (again.loaded, again.computed) == (24, 2)


def test_a_prompt_computed_in_pieces_comes_back_whole(make_engine: MakeEngine) -> None:
    engine = make_engine(batch_tokens=10)
    asked = engine.submit(prompt(61))
    while engine.scheduler.has_requests():
        engine.step()
        engine.settle()  # whatever is saved in a step has to be complete in that step
    assert asked.answer == asked.text.generated(1)
    assert asked.computed == 61
    assert engine.steps >= 7
    engine.forget_device()
    assert engine.ask(prompt(61)).loaded == 60


def test_a_block_is_saved_once(engine: Engine) -> None:
    saves = engine.ranks[0].gate.saves
    together = [engine.submit(prompt(41)) for _ in range(3)]
    engine.run()
    assert all(asked.answer == asked.text.generated(1) for asked in together)
    engine.forget_device()
    engine.ask(prompt(41))
    assert saves.blocks == 40 // BLOCK


def test_a_host_tier_smaller_than_the_prompt_keeps_its_head(make_engine: MakeEngine) -> None:
    engine = make_engine(slots=4)
    engine.ask(prompt(41))
    engine.forget_device()
    assert engine.ask(prompt(41)).loaded == 4 * BLOCK


def test_a_full_host_tier_makes_room_for_newer_prompts(make_engine: MakeEngine) -> None:
    engine = make_engine(slots=12)
    for seed in range(5):
        engine.ask(prompt(41, seed))
    engine.forget_device()
    assert engine.ask(prompt(41, seed=4)).loaded == 40


def test_a_request_that_wants_its_prompt_s_probabilities_is_computed(engine: Engine) -> None:
    engine.ask(prompt(41))
    engine.forget_device()
    asked = engine.ask(prompt(41), sampling={"prompt_logprobs": 1})
    assert (asked.loaded, asked.computed) == (0, 41)


def test_a_request_name_may_be_used_again(engine: Engine) -> None:
    engine.ask(prompt(41), name="the same")
    engine.forget_device()
    other = engine.ask(prompt(41, seed=1), name="the same")
    assert other.loaded == 0
    again = engine.ask(prompt(41), name="the same")
    assert again.loaded == 40


def test_two_ranks_load_what_both_have_saved(make_engine: MakeEngine) -> None:
    engine = make_engine(ranks=2)
    engine.ask(prompt(41), tokens=3)
    engine.forget_device()
    assert engine.ask(prompt(41), tokens=3).loaded == 40
    assert [rank.gate.loads.blocks for rank in engine.ranks] == [10, 10]


def test_the_connector_goes_by_its_old_name_as_well(make_engine: MakeEngine) -> None:
    engine = make_engine(connector="DynamoConnector")
    engine.ask(prompt(41))
    engine.forget_device()
    assert engine.ask(prompt(41)).loaded == 40


def test_checksums_at_both_ends_agree(make_engine: MakeEngine) -> None:
    engine = make_engine(verify=True)
    engine.ask(prompt(41))
    engine.forget_device()
    assert engine.ask(prompt(41)).loaded == 40
