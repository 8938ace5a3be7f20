"""Whose a block is, and for how long: no copy touches one that is somebody else's, none is lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvbm_service.errors import KvbmError, TransferError
from tests.connectors.cluster import eventually
from tests.trtllm.engine import Engine
from tests.trtllm.executor import State

PROMPT = [11 * i % 401 for i in range(50)]
FULL = 48


def hold_saves(engine: Engine) -> None:
    for rank in range(len(engine.ranks)):
        engine.gate(rank).saves.close()


def let_saves_go(engine: Engine) -> None:
    for rank in range(len(engine.ranks)):
        engine.gate(rank).saves.open()


@pytest.mark.parametrize("ranks", [1, 2])
def test_blocks_of_a_finished_request_stay_until_every_rank_has_saved_them(
    make_engine: Callable[..., Engine], ranks: int
) -> None:
    engine = make_engine(ranks=ranks)
    hold_saves(engine)
    number = engine.submit(PROMPT)
    engine.step_until(lambda: engine.request(number).state is State.DONE)
    for _ in range(3):
        engine.step()
    assert all(rank.leaving == {number} for rank in engine.ranks)
    engine.gate(0).saves.open()
    for _ in range(3):
        engine.step()
    assert all(rank.leaving == ({number} if ranks > 1 else set()) for rank in engine.ranks)
    let_saves_go(engine)
    engine.step_until(lambda: engine.at_rest)
    engine.forget_cached()
    assert engine.run(PROMPT).matched == FULL


def test_a_request_whose_blocks_are_all_kept_already_leaves_at_once(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine()
    engine.run(PROMPT)
    engine.forget_cached()
    number = engine.submit(PROMPT, max_new=1)
    engine.step_until(lambda: engine.request(number).state is State.DONE)
    assert not engine.ranks[0].leaving


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_is_kept_of_a_forward_pass_that_fails(
    make_engine: Callable[..., Engine], ranks: int
) -> None:
    engine = make_engine(ranks=ranks)
    number = engine.submit(PROMPT)
    engine.fail_forward()
    assert engine.request(number).failed
    engine.step_until(lambda: engine.at_rest)
    engine.forget_cached()
    assert engine.run(PROMPT).matched == 0
    engine.forget_cached()
    assert engine.run(PROMPT).matched == FULL


@pytest.mark.parametrize("ranks", [1, 2])
def test_blocks_of_an_aborted_request_stay_until_its_load_has_ended(
    make_engine: Callable[..., Engine], ranks: int
) -> None:
    engine = make_engine(ranks=ranks)
    engine.run(PROMPT)
    engine.forget_cached()
    engine.gate().loads.close()
    number = engine.submit(PROMPT)
    engine.step()
    eventually(lambda: engine.gate().loads.waiting)
    engine.abort(number)
    for _ in range(3):
        engine.step()
    assert all(rank.leaving == {number} for rank in engine.ranks)
    engine.gate().loads.open()
    engine.step_until(lambda: engine.at_rest)
    assert engine.run(PROMPT).matched == FULL


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_load_that_fails_ends_the_engine_before_anything_is_computed_from_it(
    make_broken: Callable[..., Engine], ranks: int
) -> None:
    engine = make_broken(ranks=ranks)
    engine.run(PROMPT)
    engine.forget_cached()
    engine.gate(ranks - 1).loads.loses = 2
    number = engine.submit(PROMPT)
    with pytest.raises(TransferError, match=r"2 block\(s\) that were promised"):
        engine.step_until(lambda: engine.request(number).generated)
    assert all(rank.requests[number].state is State.PARKED for rank in engine.ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_load_that_fails_harms_nobody_when_its_request_was_aborted(
    make_engine: Callable[..., Engine], ranks: int
) -> None:
    engine = make_engine(ranks=ranks)
    engine.run(PROMPT)
    engine.forget_cached()
    gate = engine.gate(ranks - 1)
    gate.loads.close()
    gate.loads.loses = 2
    number = engine.submit(PROMPT)
    engine.step()
    eventually(lambda: gate.loads.waiting)
    engine.abort(number)
    for _ in range(3):
        engine.step()
    gate.loads.open()
    engine.step_until(lambda: engine.at_rest)
    gate.loads.loses = 0
    assert engine.run(PROMPT).matched == FULL - 2 * 4


def test_a_step_without_new_metadata_does_not_begin_the_last_one_again(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine()
    engine.run(PROMPT)
    engine.forget_cached()
    gate = engine.gate()
    gate.loads.close()
    number = engine.submit(PROMPT)
    engine.step()
    manager = engine.ranks[0].manager
    # TensorRT-LLM binds nothing when it has scheduled nothing.
    engine._world.on_all(lambda rank: manager.start())
    engine._world.on_all(lambda rank: manager.take_finished())
    gate.loads.open()
    engine.step_until(lambda: engine.at_rest)
    assert engine.request(number).matched == FULL
    assert gate.loads.calls == 1


def test_a_rank_that_cannot_start_ends_all_of_them_with_its_reason(
    make_engine: Callable[..., Engine],
) -> None:
    with pytest.raises(KvbmError, match="DYN_KVBM"):
        make_engine({"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "0"}, ranks=2)


def test_a_leader_that_cannot_start_ends_all_ranks_with_its_reason(
    make_engine: Callable[..., Engine],
) -> None:
    nowhere = {"DYN_KVBM_METRICS": "true", "KVBM_METRICS_HOST": "192.0.2.1"}
    with pytest.raises(KvbmError, match="rank 0: KVBM_METRICS_HOST"):
        make_engine(nowhere, ranks=2)
