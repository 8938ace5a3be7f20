"""Host and disk beside an engine: what goes where, and what comes back from where."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbm_schemas.block import Tier
from kvbm_service.core.reads import Stage
from tests.connectors.cluster import LiveRegistry, eventually
from tests.connectors.engine import BLOCK, Asked, Engine, prompt
from tests.connectors.test_remote import meet

MakeEngine = Callable[..., Engine]

DISK = "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS"
UNFILTERED = {"DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "true"}


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


def on_the_disk(engine: Engine) -> int:
    """How many blocks the disk has."""
    assert engine.core.tiers.disk is not None
    return len(engine.core.tiers.disk)


def samples(engine: Engine) -> dict[str, float]:
    """What /metrics would say."""
    _, text = engine.connector._scheduler_side._leader.metrics.expose()
    lines = (line.rpartition(" ") for line in text.decode().splitlines() if line[0] != "#")
    return {name: float(value) for name, _, value in lines}


# -- what goes to disk -------------------------------------------------------------------------


def test_without_the_filter_all_blocks_are_on_disk_when_the_host_has_evicted_them(
    make_engine: MakeEngine, on_disk: Settings
) -> None:
    engine = make_engine(slots=10, extra=on_disk(**UNFILTERED))
    for seed in range(3):
        engine.ask(prompt(41, seed))
    assert on_the_disk(engine) == 30
    assert ask_again(engine, prompt(41, 0), prompt(41, 1), prompt(41, 2)) == [40, 40, 40]


def test_with_the_filter_only_what_is_used_again_goes_to_disk(
    make_engine: MakeEngine, on_disk: Settings
) -> None:
    engine = make_engine(slots=10, extra=on_disk())
    engine.ask(prompt(41, 0))
    assert on_the_disk(engine) == 0
    assert ask_again(engine, prompt(41, 0)) == [40]
    assert on_the_disk(engine) == 10
    engine.ask(prompt(41, 1))  # takes the whole host tier
    assert ask_again(engine, prompt(41, 0)) == [40]


def test_with_disk_only_blocks_go_there_at_once(make_engine: MakeEngine, on_disk: Settings) -> None:
    engine = make_engine(slots=0, extra=on_disk())
    engine.ask(prompt(41))
    assert (len(engine.core.tiers.host), on_the_disk(engine)) == (0, 10)
    assert ask_again(engine, prompt(41)) == [40]


def test_a_prefix_is_put_together_from_host_and_disk(
    make_engine: MakeEngine, on_disk: Settings
) -> None:
    engine = make_engine(slots=20, extra=on_disk(**UNFILTERED))
    engine.ask(prompt(81))
    for block in engine.core.tiers.host.blocks()[1::2]:
        assert engine.core.tiers.host.drop(block)
    assert ask_again(engine, prompt(81)) == [80]
    assert engine.ranks[0].gate.loads.blocks == 80 // BLOCK // 2
    assert engine.ranks[0].disk_gate.loads.blocks == 80 // BLOCK // 2


def test_where_tokens_come_from_is_counted_by_tier(
    make_engine: MakeEngine, on_disk: Settings
) -> None:
    engine = make_engine(slots=20, extra=on_disk(**UNFILTERED))
    engine.ask(prompt(81))
    for block in engine.core.tiers.host.blocks()[:5]:
        assert engine.core.tiers.host.drop(block)
    ask_again(engine, prompt(81))
    counted = samples(engine)
    assert counted["kvbm_matched_tokens"] == 80
    assert counted["kvbm_onboard_blocks_h2d"] == 15
    assert counted["kvbm_onboard_blocks_d2d"] == 5
    assert counted["kvbm_offload_blocks_h2d"] == 20
    assert counted["kvbm_offload_blocks_d2h"] == 25, "what came from disk is in host again"
    assert counted["kvbm_host_cache_hit_rate"] == 15 / 40
    assert counted["kvbm_disk_cache_hit_rate"] == 5 / 40


def stages(engine: Engine) -> list[Stage]:
    """How far the requests have come that wait."""
    return [reader.stage for reader in engine.core.lookups.waiting.values()]


def leased(engine: Engine) -> bool:
    """Whether owners have answered to whoever waits."""
    plans = [reader.plan for reader in engine.core.lookups.waiting.values()]
    return all(plan is not None and all(part.answered for part in plan.parts) for plan in plans)


# -- while requests wait -----------------------------------------------------------------------


def leave_to_disk(engine: Engine, texts: list[list[int]]) -> None:
    """Have these texts' blocks on the disk, and nowhere else."""
    for text in texts:
        engine.ask(text)
    engine.core.tiers.drop(Tier.HOST, engine.core.tiers.host.blocks())
    engine.forget_device()


def keep_busy(engine: Engine) -> Asked:
    """A request that leaves the device no room for another one until it ends."""
    busy = engine.submit(prompt(61, 99), tokens=24)
    engine.until(lambda: busy.answer)
    return busy


def test_disk_blocks_of_waiting_requests_come_up_while_they_wait(
    make_engine: MakeEngine, on_disk: Settings
) -> None:
    engine = make_engine(blocks=24, extra=on_disk(**UNFILTERED, KVBM_PREFETCH_SHARE=0.5))
    texts = [prompt(41, seed) for seed in range(3)]
    leave_to_disk(engine, texts)
    busy = keep_busy(engine)
    waiting = [engine.submit(text) for text in texts]
    rank = engine.ranks[0]
    engine.step()
    engine.wait(lambda: rank.disk_gate.fetches.blocks == 20)
    assert not busy.finished
    engine.run()
    assert [asked.loaded for asked in waiting] == [40, 40, 40]
    assert rank.disk_gate.loads.blocks == 10, "the next in line is loaded from where it is"
    assert rank.gate.loads.blocks == 20
    assert samples(engine)['kvbm_transferred_blocks_total{path="disk_to_host"}'] == 20


def test_no_more_comes_up_than_the_budget_allows(
    make_engine: MakeEngine, on_disk: Settings
) -> None:
    engine = make_engine(blocks=24, extra=on_disk(**UNFILTERED))  # an eighth of 64 slots
    texts = [prompt(41, seed) for seed in range(4)]
    leave_to_disk(engine, texts)
    busy = keep_busy(engine)
    waiting = [engine.submit(text) for text in texts]
    fetches = engine.ranks[0].disk_gate.fetches
    engine.until(lambda: busy.finished)
    assert fetches.blocks == 8
    engine.run()
    assert [asked.loaded for asked in waiting] == [40] * 4
    assert fetches.blocks > 8, "those who wait no longer make room for others"


def test_nothing_comes_up_early_when_that_is_turned_off(
    make_engine: MakeEngine, on_disk: Settings
) -> None:
    engine = make_engine(blocks=24, extra=on_disk(**UNFILTERED, KVBM_PREFETCH_SHARE=0))
    texts = [prompt(41, seed) for seed in range(3)]
    leave_to_disk(engine, texts)
    keep_busy(engine)
    waiting = [engine.submit(text) for text in texts]
    engine.run()
    assert [asked.loaded for asked in waiting] == [40] * 3
    assert engine.ranks[0].disk_gate.fetches.calls == 0


def test_a_request_that_is_aborted_while_its_blocks_come_up_leaves_nothing(
    make_engine: MakeEngine, on_disk: Settings
) -> None:
    engine = make_engine(blocks=24, extra=on_disk(**UNFILTERED))
    texts = [prompt(41, seed) for seed in range(3)]
    leave_to_disk(engine, texts)
    busy = keep_busy(engine)
    fetches = engine.ranks[0].disk_gate.fetches
    fetches.close()
    waiting = [engine.submit(text) for text in texts]
    engine.until(lambda: fetches.waiting)
    for asked in [*waiting, busy]:
        engine.abort(asked)
    fetches.open()
    engine.run()
    eventually(lambda: (engine.step(), not engine.core.orders.moves)[-1])


def test_blocks_that_cannot_be_brought_up_are_computed(
    make_engine: MakeEngine, on_disk: Settings
) -> None:
    engine = make_engine(blocks=24, extra=on_disk(**UNFILTERED, KVBM_PREFETCH_SHARE=0.5))
    texts = [prompt(41, seed) for seed in range(3)]
    leave_to_disk(engine, texts)
    keep_busy(engine)
    engine.ranks[0].disk_gate.fetches.failing = True
    waiting = [engine.submit(text) for text in texts]
    engine.run()
    assert [asked.computed for asked in waiting] == [1, 41, 41]


def test_what_is_wanted_again_from_another_node_comes_while_its_request_waits(
    make_node: MakeEngine, registry: LiveRegistry
) -> None:
    owner = make_node("owner")
    reader = make_node("reader", blocks=24, extra={"KVBM_PREFETCH_SHARE": 0.5})
    meet(owner, reader)
    known, unknown, first = prompt(41, 0), prompt(41, 1), prompt(41, 2)
    for text in (known, unknown, first):
        owner.ask(text)
    eventually(lambda: registry.copies == 30)
    assert reader.ask(known).loaded == 40
    reader.forget_device()
    busy = keep_busy(reader)
    waiting = [reader.submit(first)]
    reader.wait(lambda: stages(reader) == [Stage.LOCATED])
    reader.step()
    reader.wait(lambda: leased(reader))
    reader.step()
    assert stages(reader) == [Stage.READY], "which now keeps all others waiting"
    waiting += [reader.submit(text) for text in (unknown, known)]
    reader.wait(lambda: stages(reader)[1:] == [Stage.LOCATED] * 2)
    reader.step()  # asks the owner
    reader.wait(lambda: reader.core.orders.waiting)
    reader.step()
    gate = reader.ranks[0].gate
    reader.wait(lambda: gate.fetches.blocks)
    assert not busy.finished
    reader.run()
    assert [asked.loaded for asked in waiting] == [40, 40, 40]
    assert gate.fetches.blocks == 10, "what was never wanted before is used in place"
    assert gate.loads.blocks == 10
    assert gate.pulls.blocks == 30
    assert samples(reader)['kvbm_transferred_blocks_total{path="remote_to_host"}'] == 10
    eventually(lambda: not owner.core.lending.leases)


# -- a disk that fails -------------------------------------------------------------------------


def replace_file(engine: Engine, path: str, flags: int) -> None:
    """Let the disk tier's descriptor be that of something else."""
    file = engine.ranks[0].disk._file
    other = os.open(path.format(fd=file.fd), flags)
    os.dup2(other, file.fd, inheritable=False)
    os.close(other)


def make_read_only(engine: Engine) -> None:
    replace_file(engine, "/proc/self/fd/{fd}", os.O_RDONLY)


def make_unreadable(engine: Engine) -> None:
    replace_file(engine, os.devnull, os.O_WRONLY)


def cut_off(engine: Engine) -> None:
    os.ftruncate(engine.ranks[0].disk._file.fd, 0)


def test_a_disk_that_becomes_read_only_is_given_up_with_one_line_and_a_metric(
    make_engine: MakeEngine, on_disk: Settings, caplog: pytest.LogCaptureFixture, hear_us: None
) -> None:
    engine = make_engine(extra=on_disk(**UNFILTERED))
    engine.ask(prompt(41, 0))
    assert samples(engine)["kvbm_disk_works"] == 1
    make_read_only(engine)
    for seed in range(1, 5):
        engine.ask(prompt(41, seed))
    assert engine.core.tiers.disk is None
    assert samples(engine)["kvbm_disk_works"] == 0
    (line,) = [record.message for record in caplog.records if "given up" in record.message]
    assert "serving goes on" in line
    assert ask_again(engine, *(prompt(41, seed) for seed in range(5))) == [40] * 5  # from host


def test_a_disk_that_cannot_be_read_is_given_up_and_what_it_had_is_computed(
    make_engine: MakeEngine, on_disk: Settings
) -> None:
    engine = make_engine(extra=on_disk(**UNFILTERED))
    texts = [prompt(41, seed) for seed in range(3)]
    leave_to_disk(engine, texts)
    make_unreadable(engine)
    assert engine.ask(texts[0]).computed == 41
    assert engine.core.tiers.disk is None
    assert ask_again(engine, *texts) == [40, 0, 0]


def test_with_disk_only_an_engine_goes_on_without_it(
    make_engine: MakeEngine, on_disk: Settings
) -> None:
    engine = make_engine(slots=0, extra=on_disk())
    engine.ask(prompt(41))
    make_unreadable(engine)
    assert ask_again(engine, prompt(41), prompt(41), prompt(41, 1)) == [40, 0, 0]
    assert engine.core.tiers.disk is None


@pytest.mark.parametrize("slots", [0, 64])
def test_blocks_whose_bytes_are_gone_are_computed_and_not_asked_for_again(
    make_engine: MakeEngine, on_disk: Settings, slots: int
) -> None:
    engine = make_engine(slots=slots, extra=on_disk(**UNFILTERED))
    leave_to_disk(engine, [prompt(41)])
    cut_off(engine)
    asked = engine.ask(prompt(41))
    assert (asked.loaded, asked.computed) == (40, 41)
    failed = [blocks for name, blocks in samples(engine).items() if "failed_blocks" in name]
    assert sum(failed) == 10
    engine.ask(prompt(41, 1))
    assert engine.ask(prompt(41, 1)).answer
    assert ask_again(engine, prompt(41, 1))[0] in (0, 40)


def test_a_directory_that_is_removed_costs_only_the_next_life(
    make_engine: MakeEngine, on_disk: Settings, tmp_path: Path
) -> None:
    engine = make_engine(slots=10, extra=on_disk(**UNFILTERED))
    engine.ask(prompt(41, 0))
    shutil.rmtree(tmp_path / next(tmp_path.glob("kvbm-*")))
    engine.ask(prompt(41, 1))
    assert ask_again(engine, prompt(41, 0), prompt(41, 1)) == [40, 40]
    successor = make_engine(slots=10, extra=on_disk(**UNFILTERED))
    assert on_the_disk(successor) == 0
    successor.ask(prompt(41, 0))
    assert ask_again(successor, prompt(41, 0)) == [40]


def test_a_disk_that_is_lost_while_blocks_are_loaded_from_it_leaves_nothing_behind(
    make_engine: MakeEngine, on_disk: Settings
) -> None:
    engine = make_engine(extra=on_disk(**UNFILTERED))
    leave_to_disk(engine, [prompt(41)])
    gate = engine.ranks[0].disk_gate
    gate.loads.close()
    asked = engine.submit(prompt(41))
    engine.until(lambda: gate.loads.waiting)
    make_read_only(engine)
    engine.submit(prompt(41, 1))
    engine.until(lambda: engine.core.tiers.disk is None)
    gate.loads.open()
    engine.run()
    assert asked.answer == asked.text.generated(1)


def test_a_disk_that_is_lost_while_blocks_come_up_leaves_nothing_behind(
    make_engine: MakeEngine, on_disk: Settings
) -> None:
    engine = make_engine(blocks=24, extra=on_disk(**UNFILTERED))
    texts = [prompt(41, seed) for seed in range(3)]
    leave_to_disk(engine, texts)
    keep_busy(engine)
    gate = engine.ranks[0].disk_gate
    gate.fetches.close()
    waiting = [engine.submit(text) for text in texts]
    engine.step()
    engine.wait(lambda: gate.fetches.waiting)  # with steps, the busy request might end meanwhile
    make_read_only(engine)
    engine.until(lambda: engine.core.tiers.disk is None)
    gate.fetches.open()
    engine.run()
    for asked in waiting:
        assert asked.answer == asked.text.generated(1)


def test_when_one_rank_loses_its_disk_all_go_on_without(
    make_engine: MakeEngine, on_disk: Settings
) -> None:
    engine = make_engine(ranks=2, extra=on_disk(**UNFILTERED))
    leave_to_disk(engine, [prompt(41)])
    make_read_only(engine)
    engine.ask(prompt(41, 1))
    assert engine.core.tiers.disk is None
    assert ask_again(engine, prompt(41), prompt(41, 1)) == [0, 40]
