"""Blocks that lie on another node's disk: its engine is idle, and still they come."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbm_schemas.block import Tier
from tests.connectors.cluster import LiveRegistry, eventually
from tests.connectors.engine import Asked, Engine, prompt
from tests.connectors.test_remote import meet

MakeEngine = Callable[..., Engine]

PATIENT = {"KVBM_STAGING_DEADLINE_MS": 20_000}
HURRIED = {"KVBM_STAGING_DEADLINE_MS": 300}

TEXT = prompt(41)


@pytest.fixture
def make_owner(make_node: MakeEngine, tmp_path: Path) -> MakeEngine:
    """Makes an owner whose disk gets all blocks."""

    def make(**shape: Any) -> Engine:
        extra = {
            "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": 64,
            "DYN_KVBM_DISK_CACHE_DIR": str(tmp_path / "owner"),
            "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "true",
        }
        return make_node("owner", extra=extra | shape.pop("extra", PATIENT), **shape)

    return make


@pytest.fixture
def make_pair(
    make_owner: MakeEngine, make_node: MakeEngine, registry: LiveRegistry
) -> Callable[..., tuple[Engine, Engine]]:
    """Makes an owner whose disk has `TEXT`, while its host tier does not, and a reader."""

    def make(extra: dict[str, Any] = PATIENT, **shape: Any) -> tuple[Engine, Engine]:
        owner = make_owner(extra=extra, **shape)
        reader = make_node("reader", extra=extra, ranks=owner.shape.ranks)
        meet(owner, reader)
        asked = owner.ask(TEXT)
        evict(owner, asked)
        eventually(lambda: registry.copies == 10)
        return owner, reader

    return make


MakePair = Callable[..., tuple[Engine, Engine]]


def evict(owner: Engine, asked: Asked, start: int = 0, step: int = 1) -> None:
    """Let the host tier lose these blocks of a text."""
    leader = owner.connector._scheduler_side._leader
    names = asked.names[start::step]
    leader.on_core(lambda core: core.tiers.drop(Tier.HOST, names), None)


def held(engine: Engine) -> tuple[int, int]:
    """How many blocks are in host and disk."""
    tiers = engine.core.tiers
    return len(tiers.host), len(tiers.disk) if tiers.disk is not None else 0


def at_rest(*engines: Engine) -> bool:
    """No lease, no pin, no slot being filled."""
    pools = [pool for one in engines for pool in (one.core.tiers.host, one.core.tiers.disk) if pool]
    return all(
        not engine.core.lending.leases and not engine.core.orders.moves for engine in engines
    ) and all(not pool.pinned and pool.used == len(pool) for pool in pools)


@pytest.mark.parametrize("ranks", [1, 2])
def test_blocks_come_up_from_the_disk_of_an_idle_owner(make_pair: MakePair, ranks: int) -> None:
    owner, reader = make_pair(ranks=ranks)
    steps = owner.steps
    asked = reader.ask(TEXT, tokens=5)
    assert (asked.loaded, asked.computed) == (40, 5)
    assert owner.steps == steps
    assert [rank.disk_gate.fetches.blocks for rank in owner.ranks] == [10] * ranks
    eventually(lambda: at_rest(owner, reader))
    assert held(owner) == (10, 10)


def test_an_owner_with_a_disk_only_lends_through_a_few_slots_of_memory(
    make_pair: MakePair,
) -> None:
    owner, reader = make_pair(slots=0)
    asked = reader.ask(TEXT)
    assert (asked.loaded, asked.computed) == (40, 1)
    eventually(lambda: at_rest(owner, reader))


@pytest.mark.parametrize(("start", "step"), [(5, 1), (0, 2), (1, 2), (9, 1)])
def test_what_is_in_host_and_what_is_on_disk_come_together(
    make_owner: MakeEngine, make_node: MakeEngine, registry: LiveRegistry, start: int, step: int
) -> None:
    owner, reader = make_owner(), make_node("reader", extra=PATIENT)
    meet(owner, reader)
    evict(owner, owner.ask(TEXT), start, step)
    eventually(lambda: registry.copies == sum(held(owner)))
    assert reader.ask(TEXT).loaded == 40
    assert owner.ranks[0].disk_gate.fetches.blocks == len(range(start, 10, step))
    eventually(lambda: at_rest(owner, reader))


def test_for_two_readers_at_once_blocks_come_up_once(
    make_pair: MakePair, make_node: MakeEngine
) -> None:
    owner, one = make_pair()
    two = make_node("other-reader", extra=PATIENT)
    meet(owner, one, two)
    fetches = owner.ranks[0].disk_gate.fetches
    fetches.close()
    first, second = one.submit(TEXT), two.submit(TEXT)
    eventually(lambda: (one.step(), two.step(), fetches.waiting)[-1])
    for _ in range(20):
        one.step()
        two.step()
    fetches.open()
    one.run()
    two.run()
    assert first.loaded == 40
    assert first.answer == second.answer == first.text.generated(1)
    assert fetches.blocks == 10
    eventually(lambda: at_rest(owner, one, two))


def test_a_disk_that_is_too_slow_costs_a_computation_and_is_ready_next_time(
    make_pair: MakePair,
) -> None:
    owner, reader = make_pair(HURRIED)
    fetches = owner.ranks[0].disk_gate.fetches
    fetches.close()
    asked = reader.ask(TEXT)
    assert (asked.loaded, asked.computed) == (0, 41)
    fetches.open()
    owner.until(lambda: held(owner) == (10, 10))  # a rank that answers late answers by the step
    eventually(lambda: at_rest(owner, reader))


def test_a_reader_gets_what_is_in_host_when_the_disk_is_too_slow(
    make_owner: MakeEngine, make_node: MakeEngine, registry: LiveRegistry
) -> None:
    owner, reader = make_owner(extra=HURRIED), make_node("reader", extra=HURRIED)
    meet(owner, reader)
    evict(owner, owner.ask(TEXT), start=6)
    eventually(lambda: registry.copies == 16)
    fetches = owner.ranks[0].disk_gate.fetches
    fetches.close()
    asked = reader.ask(TEXT)
    assert (asked.loaded, asked.computed) == (24, 17)
    fetches.open()
    owner.until(lambda: at_rest(owner, reader))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_fails_costs_a_computation_and_its_blocks_are_gone(
    make_pair: MakePair, registry: LiveRegistry, ranks: int
) -> None:
    owner, reader = make_pair(ranks=ranks)
    owner.ranks[-1].disk_gate.fetches.failing = True
    asked = reader.ask(TEXT)
    assert (asked.loaded, asked.computed) == (0, 41)
    eventually(lambda: at_rest(owner, reader))
    assert held(owner) == (0, 0)
    eventually(lambda: registry.copies == 10)  # the reader's


def test_a_disk_that_is_lost_is_given_up_with_the_owners_next_step(
    make_pair: MakePair, registry: LiveRegistry
) -> None:
    owner, reader = make_pair()
    file = owner.ranks[0].disk._file
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, file.fd, inheritable=False)
    os.close(nowhere)
    asked = reader.ask(TEXT)
    assert (asked.loaded, asked.computed) == (0, 41)
    eventually(lambda: at_rest(owner, reader))
    owner.ask(prompt(41, 1))
    assert owner.core.tiers.disk is None
    owner.forget_device()
    assert owner.ask(prompt(41, 1)).loaded == 40
    eventually(lambda: registry.copies == len(reader.core.tiers.host) + held(owner)[0])


def test_a_message_that_never_reaches_the_rank_is_repeated_with_the_owners_next_step(
    make_pair: MakePair,
) -> None:
    owner, reader = make_pair(HURRIED)
    owner.ranks[0].lose_fetches()
    asked = reader.ask(TEXT)
    assert (asked.loaded, asked.computed) == (0, 41)
    assert held(owner) == (0, 10)
    eventually(lambda: owner.core.orders.waiting)
    owner.run()
    assert held(owner) == (10, 10)
    eventually(lambda: at_rest(owner, reader))


@pytest.mark.parametrize("ranks", [1, 2])
def test_when_the_ranks_answer_is_lost_it_is_asked_again_and_does_nothing_twice(
    make_pair: MakePair, ranks: int
) -> None:
    owner, reader = make_pair(HURRIED, ranks=ranks)
    owner.ranks[-1].lose_answers()
    reader.ask(TEXT)
    eventually(lambda: owner.core.orders.waiting)
    owner.run()
    assert held(owner) == (10, 10)
    assert [rank.disk_gate.fetches.calls for rank in owner.ranks] == [1] * ranks
    eventually(lambda: at_rest(owner, reader))


def test_a_request_aborted_while_it_waits_for_the_disk_leaves_nothing(make_pair: MakePair) -> None:
    owner, reader = make_pair()
    fetches = owner.ranks[0].disk_gate.fetches
    fetches.close()
    asked = reader.submit(TEXT)
    reader.until(lambda: fetches.waiting)
    reader.abort(asked)
    fetches.open()
    reader.run()
    eventually(lambda: held(owner) == (10, 10))
    eventually(lambda: at_rest(owner, reader))


def test_an_owner_that_forgets_everything_meanwhile_lends_nothing(
    make_pair: MakePair, registry: LiveRegistry
) -> None:
    owner, reader = make_pair()
    fetches = owner.ranks[0].disk_gate.fetches
    fetches.close()
    asked = reader.submit(TEXT)
    reader.until(lambda: fetches.waiting)
    assert owner.scheduler.reset_prefix_cache(reset_connector=True)
    fetches.open()
    reader.run()
    assert asked.computed == 41
    owner.run()
    eventually(lambda: at_rest(owner, reader))
    assert held(owner) == (0, 0)
    eventually(lambda: registry.copies == 10)  # the reader's
