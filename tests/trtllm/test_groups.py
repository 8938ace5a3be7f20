"""Layers that do not all keep the same blocks: groups with windows, and pages of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbm_service.adapters.nats_server import EmbeddedNats
from tests.connectors.cluster import LiveRegistry, eventually
from tests.trtllm.conftest import ALONE
from tests.trtllm.engine import Engine
from tests.trtllm.executor import State
from tests.trtllm.forms import Form
from tests.trtllm.pool import NO_PAGE

PROMPT = [29 * i % 401 for i in range(50)]
FULL = 48
HYBRID = (None, 10, 6)
"""Full attention beside two windows."""
ROOM = 96
"""A device pool of which saves may keep as much as a prompt fills."""

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_hybrid(loaded: dict[str, Form]) -> Iterator[MakeEngine]:
    """Makes engines of the newest form, with groups of layers, that are checked for leaks."""
    engines: list[Engine] = []

    def make(environment: dict[str, str] | None = None, **shape: Any) -> Engine:
        shape = {"windows": HYBRID, "blocks": ROOM} | shape
        engines.append(Engine(loaded["newest"], ALONE | (environment or {}), **shape))
        return engines[-1]

    yield make
    for engine in reversed(engines):
        engine.close()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("windows", [HYBRID, (6, None), (10,), (None, None)], ids=str)
def test_a_forgotten_prompt_is_loaded_into_all_groups(
    make_hybrid: MakeEngine, windows: tuple[int | None, ...], ranks: int
) -> None:
    engine = make_hybrid(windows=windows, ranks=ranks)
    first = engine.run(PROMPT, max_new=10)
    engine.forget_cached()
    longer = [*first.tokens, 5, 6, 7]
    again = engine.run(longer, max_new=6)
    assert again.matched == (len(first.tokens) - 1) // 4 * 4
    engine.forget_cached()
    assert engine.run([*longer[:40], 400]).matched == 40, "a prefix needs no window of its end"


def test_only_what_the_device_lacks_is_loaded_into_each_group(make_hybrid: MakeEngine) -> None:
    engine = make_hybrid()
    engine.run(PROMPT)
    engine.forget_cached()
    engine.run(PROMPT[:8])
    again = engine.run(PROMPT)
    assert (again.reused, again.matched) == (8, FULL - 8)


def test_blocks_beyond_a_window_are_not_loaded(make_hybrid: MakeEngine) -> None:
    engine = make_hybrid()
    engine.run(PROMPT)
    engine.forget_cached()
    number = engine.submit(PROMPT)
    engine.step()
    tables = engine.request(number).tables
    assert [table.count(NO_PAGE) for table in tables] == [0, (FULL - 9) // 4, (FULL - 5) // 4]
    engine.step_until(lambda: engine.at_rest)
    assert engine.request(number).generated == engine.request(number).text.generated(2)


@pytest.mark.parametrize("room", [0, 3, 9])
def test_a_device_with_less_room_than_was_promised_computes_the_rest(
    make_hybrid: MakeEngine, room: int
) -> None:
    engine = make_hybrid(ranks=2)
    engine.run(PROMPT)
    engine.forget_cached()
    for rank in engine.ranks:
        rank.reserve_blocks = room
    assert engine.run(PROMPT).matched == FULL


def test_a_block_that_was_not_saved_in_its_step_is_not_saved_when_a_window_has_passed_it(
    make_hybrid: MakeEngine,
) -> None:
    engine = make_hybrid(windows=(6,), blocks=16)  # saves may hold 8 blocks
    engine.gate().saves.close()
    engine.submit(PROMPT, max_new=10)
    for _ in range(2):
        engine.step()
    engine.gate().saves.open()
    engine.submit([400, *PROMPT[:39]])
    engine.step_until(lambda: engine.at_rest)
    engine.forget_cached()
    assert engine.run([*PROMPT[:44], 400]).matched == 32


def leave_room(engine: Engine, pages: int) -> None:
    """All pages but the last few of every group are somebody else's."""
    for rank in engine.ranks:
        for pool in rank.pools:
            pool.take(pool.free - pages)


def give_back(engine: Engine) -> None:
    """Undo `leave_room`, of an engine at rest."""
    for rank in engine.ranks:
        for pool, count in zip(rank.pools, rank.memory.counts, strict=True):
            pool.leave([page for page in range(count) if pool.is_used(page)])


def test_every_group_has_pages_of_its_own_up_to_the_last(make_hybrid: MakeEngine) -> None:
    engine = make_hybrid()
    leave_room(engine, 14)
    engine.run(PROMPT)
    engine.forget_cached()
    assert engine.run(PROMPT).matched == FULL
    give_back(engine)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_writes_to_what_is_being_saved_waits_for_that(
    make_hybrid: MakeEngine, ranks: int
) -> None:
    engine = make_hybrid(ranks=ranks, windows=(6,))
    leave_room(engine, 16)
    slow = engine.gate(ranks - 1).saves
    slow.close()
    first = engine.submit(PROMPT[:28], max_new=20)
    engine.step()
    engine.step()
    eventually(lambda: slow.waiting)
    second = engine.submit([400, *PROMPT[:11]], max_new=2)
    let_go = threading.Timer(0.3, slow.open)
    let_go.start()
    engine.step_until(lambda: engine.at_rest)
    let_go.join()
    for number in (first, second):
        request = engine.request(number)
        assert request.generated == request.text.generated(request.max_new)
    give_back(engine)
    engine.forget_cached()
    assert engine.run(PROMPT[:28]).matched
    engine.forget_cached()
    assert engine.run([400, *PROMPT[:12]]).matched == 12


def test_hybrid_engines_read_each_others_blocks(
    make_hybrid: MakeEngine, nats: EmbeddedNats
) -> None:
    with LiveRegistry(nats.url) as registry:

        def node(name: str) -> Engine:
            return make_hybrid(
                {
                    "KVBM_NATS_URL": nats.url,
                    "KVBM_NODE_NAME": name,
                    "KVBM_LOOKUP_DEADLINE_MS": "5000",
                }
            )

        first, second = node("a"), node("b")
        prompts = ([start, *PROMPT[1:]] for start in range(1, 400))

        def found() -> bool:
            prompt, before = next(prompts), registry.copies
            first.run(prompt, max_new=1)
            eventually(lambda: registry.copies >= before + FULL // 4)
            return second.run(prompt, max_new=1).matched == FULL

        eventually(found)


def test_hybrid_blocks_come_back_from_a_disk(make_hybrid: MakeEngine, tmp_path: Path) -> None:
    engine = make_hybrid(
        {
            "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "0",
            "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": "64",
            "DYN_KVBM_DISK_CACHE_DIR": str(tmp_path),
            "DYN_KVBM_DISK_DISABLE_O_DIRECT": "true",
        },
        ranks=2,
    )
    engine.run(PROMPT)
    engine.forget_cached()
    assert engine.run(PROMPT).matched == FULL


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("windows", [HYBRID, (None,)], ids=str)
def test_a_paused_request_gives_its_blocks_away_at_once_and_nothing_wrong_is_kept(
    make_hybrid: MakeEngine, windows: tuple[int | None, ...], ranks: int
) -> None:
    engine = make_hybrid(ranks=ranks, windows=windows)
    leave_room(engine, 20)
    slow = engine.gate(ranks - 1).saves
    slow.close()
    first = engine.submit(PROMPT, max_new=8)
    engine.step()
    eventually(lambda: slow.waiting)
    engine.pause(first)
    let_go = threading.Timer(0.3, slow.open)
    let_go.start()
    engine.step_until(lambda: engine.request(first).state is State.DONE)
    let_go.join()
    engine.step_until(lambda: engine.at_rest)
    assert engine.request(first).generated == engine.request(first).text.generated(8)
    give_back(engine)
    engine.forget_cached()
    assert engine.run(PROMPT).matched == FULL
