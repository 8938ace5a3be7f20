"""A prompt that one engine has computed: another goes on, and is told where the blocks are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbm_connectors import kv_transfer_params
from kvbm_service.adapters.nats_server import EmbeddedNats
from kvbm_service.core.reads import Origin, Stage
from tests.connectors.cluster import eventually
from tests.connectors.engine import Asked, Engine, full_attention, prompt, sliding_window
from tests.connectors.releases import needs_lost_requests

MakeEngine = Callable[..., Engine]

PREFILL = {"do_remote_decode": True}
SHORT_LEASES = {"KVBM_LEASE_SECONDS": 1.0}
THROUGH_HOST = {"KVBM_LEND_DEVICE": False}
PATIENT = {"KVBM_LOOKUP_DEADLINE_MS": 5_000}


@pytest.fixture
def make_node(make_engine: MakeEngine, nats: EmbeddedNats) -> Iterator[MakeEngine]:
    """Makes engines that know of each other, and no registry. In the end nothing is kept."""
    engines: list[Engine] = []

    def make(name: str, **shape: Any) -> Engine:
        extra = PATIENT | shape.pop("extra", {})
        engines.append(make_engine(node=name, nats=nats.url, extra=extra, **shape))
        return engines[-1]

    yield make
    for engine in engines:
        end_all(engine)
        eventually(lambda engine=engine: all_is_given_back(engine))


@pytest.fixture
def pair(make_node: MakeEngine) -> tuple[Engine, Engine]:
    """A prefill engine and a decode engine."""
    return meet(make_node("prefill"), make_node("decode"))


def meet(prefill: Engine, decode: Engine) -> tuple[Engine, Engine]:
    """Wait until the decode engine can ask the other one."""
    name = prefill.shape.node
    eventually(lambda: decode.core.peers.online and decode.core.peers.can_ask(name, 0.0))
    return prefill, decode


def compute(prefill: Engine, tokens: int = 41) -> dict[str, Any]:
    """Have a prompt computed; what the answer says to whoever goes on."""
    asked = prefill.ask(prompt(tokens), transfer=PREFILL)
    assert asked.handed_over is not None
    return asked.handed_over


def pulled(engine: Engine) -> int:
    return engine.ranks[0].gate.pulls.blocks


def all_is_given_back(engine: Engine) -> bool:
    """Whether nothing is kept for anybody; lets the engine hear of it."""
    engine.run()
    kept = len(engine.core.hand_overs) + engine.core.tiers.host.pinned
    return kept == 0 and engine.free_blocks == engine.shape.blocks - 1


def end_all(engine: Engine) -> None:
    """Take back what was handed over."""
    leader = engine.connector._scheduler_side._leader
    leader.on_core(lambda core: core.hand_overs.end_all("the test wants it"), None)


def test_the_answer_names_node_lease_and_blocks(pair: tuple[Engine, Engine]) -> None:
    told = compute(pair[0])
    assert told["node"] == "prefill"
    assert told["blocks"] == 10
    assert len(told["lease"]) >= 16
    assert told["do_remote_prefill"] is True


@pytest.mark.parametrize("extra", [{}, THROUGH_HOST], ids=["from the device", "from the host"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_decode_engine_computes_only_the_tail_that_fills_no_block(
    make_node: MakeEngine, ranks: int, extra: dict[str, Any]
) -> None:
    prefill, decode = meet(
        make_node("prefill", ranks=ranks, extra=extra), make_node("decode", ranks=ranks)
    )
    told = compute(prefill)
    lent = [rank._worker.record.device is not None for rank in prefill.ranks]
    assert all(lent) == (not extra)
    if extra:
        prefill.run()
    asked = decode.ask(prompt(41), tokens=5, transfer=told)
    assert (asked.loaded, asked.computed) == (40, 5)
    assert [rank.gate.pulls.blocks for rank in decode.ranks] == [10] * ranks
    eventually(lambda: all_is_given_back(prefill))


@needs_lost_requests
def test_blocks_that_are_rows_are_handed_over_through_the_host(make_node: MakeEngine) -> None:
    shape = {"specs": (full_attention(), sliding_window()), "blocks": 256}
    prefill, decode = meet(make_node("prefill", **shape), make_node("decode", **shape))
    told = compute(prefill)
    assert prefill.ranks[0]._worker.record.device is None
    prefill.run()
    asked = decode.ask(prompt(41), tokens=5, transfer=told)
    assert (asked.loaded, asked.computed) == (40, 5)
    eventually(lambda: all_is_given_back(prefill))


@pytest.mark.parametrize("ranks", [1, 2])
def test_blocks_that_lie_on_the_prefill_engines_disk_are_handed_over_from_there(
    make_node: MakeEngine, tmp_path: Path, ranks: int
) -> None:
    on_disk = THROUGH_HOST | {
        "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": 64,
        "DYN_KVBM_DISK_CACHE_DIR": str(tmp_path),
        "KVBM_STAGING_DEADLINE_MS": 20_000,
    }
    waits = {"KVBM_HAND_OVER_DEADLINE_MS": 20_000}
    prefill, decode = meet(
        make_node("prefill", ranks=ranks, slots=0, extra=on_disk),
        make_node("decode", ranks=ranks, extra=waits),
    )
    told = compute(prefill)
    prefill.run()
    tiers = prefill.core.tiers
    assert (len(tiers.host), len(tiers.disk or ())) == (0, 10)
    asked = decode.ask(prompt(41), tokens=5, transfer=told)
    assert (asked.loaded, asked.computed) == (40, 5)
    assert [rank.gate.pulls.blocks for rank in decode.ranks] == [10] * ranks
    eventually(lambda: all_is_given_back(prefill))


def test_blocks_are_read_from_the_device_though_they_were_saved_nowhere(
    make_node: MakeEngine,
) -> None:
    prefill, decode = meet(make_node("prefill"), make_node("decode"))
    saves = prefill.ranks[0].gate.saves
    saves.close()
    asked = prefill.submit(prompt(41), transfer=PREFILL)
    prefill.until(lambda: asked.finished)
    assert decode.ask(prompt(41), transfer=asked.handed_over).loaded == 40
    saves.open()
    prefill.run()
    eventually(lambda: all_is_given_back(prefill))


def test_lent_blocks_stay_while_the_prefill_engine_needs_room(pair: tuple[Engine, Engine]) -> None:
    prefill, decode = pair
    told = compute(prefill)
    for seed in range(1, 12):
        prefill.ask(prompt(81, seed))
    asked = decode.ask(prompt(41), transfer=told)
    assert (asked.loaded, pulled(decode)) == (40, 10)


def test_what_the_decode_engine_has_itself_is_not_read_again(pair: tuple[Engine, Engine]) -> None:
    prefill, decode = pair
    decode.ask(prompt(21))
    asked = decode.ask(prompt(41), transfer=compute(prefill))
    assert (asked.loaded, pulled(decode)) == (20, 5)
    eventually(lambda: all_is_given_back(prefill))


def test_a_prompt_that_the_decode_engine_has_whole_is_given_back_at_once(
    pair: tuple[Engine, Engine],
) -> None:
    prefill, decode = pair
    decode.ask(prompt(41))
    assert decode.ask(prompt(41), transfer=compute(prefill)).loaded == 0
    eventually(lambda: all_is_given_back(prefill))


def test_a_prompt_that_goes_on_further_is_computed_from_there(pair: tuple[Engine, Engine]) -> None:
    prefill, decode = pair
    asked = decode.ask(prompt(61), transfer=compute(prefill))
    assert (asked.loaded, asked.computed) == (40, 21)


def test_what_nobody_fetches_is_given_back_after_its_time(make_node: MakeEngine) -> None:
    prefill = make_node("prefill", extra=SHORT_LEASES)
    compute(prefill)
    assert prefill.free_blocks < prefill.shape.blocks - 1
    eventually(lambda: all_is_given_back(prefill))


def test_a_decode_request_that_waits_keeps_its_blocks(make_node: MakeEngine) -> None:
    """Longer than a lease lasts, because it says so again and again."""
    prefill, decode = meet(
        make_node("prefill", extra={"KVBM_LEASE_SECONDS": 3.0}),
        make_node("decode", extra={"KVBM_LEASE_SECONDS": 3.0}),
    )
    asked = decode.submit(prompt(41), transfer=compute(prefill))
    until = time.monotonic() + 6.0
    while time.monotonic() < until:
        prefill.run()
        time.sleep(0.05)
    decode.run()
    assert (asked.answer, asked.loaded) == (asked.text.generated(1), 40)


def test_an_aborted_decode_request_gives_its_blocks_back(pair: tuple[Engine, Engine]) -> None:
    prefill, decode = pair
    asked = decode.submit(prompt(41), transfer=compute(prefill))
    decode.step()
    decode.abort(asked)
    decode.run()
    eventually(lambda: all_is_given_back(prefill))


def test_a_decode_request_that_is_aborted_while_it_loads_gives_its_blocks_back(
    pair: tuple[Engine, Engine],
) -> None:
    prefill, decode = pair
    pulls = decode.ranks[0].gate.pulls
    pulls.close()
    asked = decode.submit(prompt(41), transfer=compute(prefill))
    decode.until(lambda: pulls.waiting)
    decode.abort(asked)
    pulls.open()
    decode.run()
    eventually(lambda: all_is_given_back(prefill))


def test_an_aborted_prefill_request_hands_nothing_over(pair: tuple[Engine, Engine]) -> None:
    prefill, _ = pair
    asked = prefill.submit(prompt(41), tokens=20, transfer=PREFILL)
    prefill.step()
    prefill.abort(asked)
    prefill.run()
    assert asked.handed_over is None
    assert all_is_given_back(prefill)


def test_without_a_prefill_engine_the_decode_engine_computes_in_time(
    make_node: MakeEngine,
) -> None:
    prefill, decode = meet(make_node("prefill"), make_node("decode", extra=SHORT_LEASES))
    told = compute(prefill)
    end_all(prefill)
    eventually(lambda: all_is_given_back(prefill))
    prefill.close()
    asked = decode.ask(prompt(41), transfer=told)
    assert (asked.loaded, asked.computed) == (0, 41)


def test_a_decode_engine_waits_as_long_as_it_is_told_to(make_node: MakeEngine) -> None:
    lasting, shorter = ({"KVBM_HAND_OVER_DEADLINE_MS": ms} for ms in (60_000, 4_000))
    hurried = shorter | {"KVBM_LOOKUP_DEADLINE_MS": 20}
    prefill, decode = meet(
        make_node("prefill", extra=THROUGH_HOST | lasting), make_node("decode", extra=hurried)
    )
    saves = prefill.ranks[0].gate.saves
    saves.close()
    asked = prefill.submit(prompt(41), transfer=PREFILL)
    prefill.until(lambda: asked.finished)
    began = time.monotonic()
    assert decode.ask(prompt(41), transfer=asked.handed_over).loaded == 0
    assert 3.5 < time.monotonic() - began < 30.0
    saves.open()
    prefill.run()
    eventually(lambda: all_is_given_back(prefill))


def test_blocks_that_went_while_they_were_read_are_not_believed(make_node: MakeEngine) -> None:
    prefill, decode = meet(make_node("prefill"), make_node("decode"))
    pulls = decode.ranks[0].gate.pulls
    pulls.close()
    asked = decode.submit(prompt(41), transfer=compute(prefill))
    decode.until(lambda: pulls.waiting)
    end_all(prefill)
    eventually(lambda: all_is_given_back(prefill))
    prefill.forget_device()
    for seed in range(1, 8):
        prefill.ask(prompt(81, seed))
    pulls.open()
    decode.run()
    assert asked.answer == asked.text.generated(1)
    assert (pulled(decode), asked.computed) == (0, 41)


@pytest.mark.parametrize(
    "told",
    [
        {"node": "prefill"},
        {"node": "prefill", "lease": "f" * 32, "blocks": 10},
        {"node": "nobody", "lease": "f" * 32, "blocks": 10},
        {"node": "../x", "lease": 7, "blocks": -1},
        {"node": "prefill", "lease": "f" * 32, "blocks": 2**40},
    ],
    ids=["half", "a made-up lease", "an unknown node", "nonsense", "too much"],
)
def test_what_was_made_up_is_computed(pair: tuple[Engine, Engine], told: dict[str, Any]) -> None:
    prefill, decode = pair
    compute(prefill)
    asked: Asked = decode.ask(prompt(41), transfer={"do_remote_prefill": True} | told)
    assert (asked.loaded, asked.computed) == (0, 41)
    assert not [r for r in decode.core.lookups.readers.values() if r.stage is Stage.LOADING]


@pytest.mark.parametrize(
    "told",
    [
        {"node": "prefill\n"},
        {"node": "prefill.\r\nPUB x 0"},
        {"lease": "f" * 32 + "\n"},
        {"lease": "\ud800" * 16},
        {"blocks": True},
        {"blocks": 10**40},
        {"blocks": -1},
        {3: 4},
    ],
    ids=str,
)
def test_what_could_not_be_sent_on_is_not_believed(told: dict[Any, Any]) -> None:
    """JSON knows half characters, and the bus ends its lines with a line's end."""
    good = {"do_remote_prefill": True, "node": "prefill", "lease": "f" * 32, "blocks": 10}
    assert kv_transfer_params.read(good) == Origin("prefill", "f" * 32, 10)
    assert kv_transfer_params.read(good | told) is None


def test_a_request_that_was_preempted_is_handed_over_through_the_host_tier(
    pair: tuple[Engine, Engine],
) -> None:
    """It may end by an output from before, while its new blocks are still to be computed."""
    prefill, decode = pair
    asked = prefill.submit(prompt(41), tokens=8, transfer=PREFILL)
    prefill.until(lambda: len(asked.answer) == 2)
    while prefill.core.busy:  # what is being saved cannot be reset
        prefill.settle()
        prefill.step()
    assert prefill.scheduler.reset_prefix_cache(reset_running_requests=True)
    prefill.run()
    assert asked.request.num_preemptions == 1
    assert not prefill.core.lent._lent
    assert decode.ask(prompt(41), transfer=asked.handed_over).loaded == 40


def test_the_prefix_cache_can_be_reset_once_what_is_lent_was_taken_back(
    pair: tuple[Engine, Engine],
) -> None:
    """vLLM resets nothing while a block is in use. Asked so, it tells us at least."""
    prefill, decode = pair
    told = compute(prefill)
    assert not prefill.scheduler.reset_prefix_cache(reset_connector=True)
    prefill.run()
    assert prefill.scheduler.reset_prefix_cache(reset_connector=True)
    asked = decode.ask(prompt(41), transfer=told)
    assert (asked.loaded, asked.computed) == (0, 41)


def test_two_requests_of_one_prompt_both_get_it(pair: tuple[Engine, Engine]) -> None:
    prefill, decode = pair
    one, other = compute(prefill), compute(prefill)
    assert decode.ask(prompt(41), transfer=one).loaded == 40
    decode.forget_device()
    assert decode.ask(prompt(41), transfer=other).loaded == 40
    eventually(lambda: all_is_given_back(prefill))
